"""Finished runs against the base model on the same chains (`rlr-ray evaluate`), and their pictures (`rlr-ray sample`)."""
