"""Ray: the only folder, beside tune, that imports it, after `utils.environment.set_variables`."""
