"""What can go wrong, as callers see it. Every message names the thing and what to do about it."""


class EngineError(Exception):
    """The engine cannot do what was asked."""


class ModelNotFound(EngineError):
    """No plugin, folder or file of that name."""


class BadCheckpoint(EngineError):
    """A file of the checkpoint is damaged, incomplete or not what its config says."""


class DownloadFailed(EngineError):
    """The files could not be fetched, or are not the expected ones."""


class OutOfMemory(EngineError):
    """Weights or cache do not fit."""


class DeviceError(EngineError):
    """The device cannot be had, or failed."""
