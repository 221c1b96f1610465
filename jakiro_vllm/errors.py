"""What a user can get wrong. Every message says what, what was received, what is allowed, and the remedy."""


class JakiroError(ValueError):
    """Base of all refusals."""


class JakiroConfigError(JakiroError):
    """A setting, a platform or a target that cannot work."""


class HeadCheckpointError(JakiroError):
    """A head that is missing, damaged, or contradicts its configuration or its target."""


class TrainingDataError(JakiroError):
    """Prompts or intermediate results that cannot be read."""
