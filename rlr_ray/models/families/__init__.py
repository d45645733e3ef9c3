"""The families of pipelines, a file each with `load(config, adapter, sampler, device, request) -> Model`."""
