"""Ray: the only folder that imports it."""

import os

# Before Ray is imported: how soon a report returns, and no message per worker on the driver's screen.
os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.2")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# For the processes of a Ray that is started here: if they were told as the job's environment, Ray could not use the
# processes that it has ready.
os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
