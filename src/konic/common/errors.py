"""The errors at the place and under the names that konic 0.1 had for them."""

from konic.finetuning.errors import ConfigError, KonicError

KonicValidationError = ConfigError
KonicConfigurationError = ConfigError
KonicRuntimeError = KonicError

__all__ = ["KonicConfigurationError", "KonicError", "KonicRuntimeError", "KonicValidationError"]
