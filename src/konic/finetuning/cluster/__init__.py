"""An engine and Ray's ScalingConfig -> the same training in the workers of Ray Train, reported where it was started."""
