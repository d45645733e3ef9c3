"""Finished runs against the base model on the same chains (`rlr-ray evaluate`); their pictures (`rlr-ray sample`)."""
