"""Every error a user can meet. Each message says what is wrong, by name, and what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ZooError(Exception):
    """The parent of all errors that zoo raises on purpose."""


def nearest(name: str, known: Iterable[str], count: int = 3) -> str:
    """The known names closest to `name`, as a phrase for an error message."""
    known = sorted(known)
    lowered = {k.lower(): k for k in known}
    found = difflib.get_close_matches(name.lower(), lowered, n=count, cutoff=0.4)
    if found:
        return "nearest: " + ", ".join(lowered[f] for f in found)
    return "known: " + ", ".join(known)


# --- names -----------------------------------------------------------------------------------------------------------
class UnknownName(ZooError, LookupError):
    """A name that the catalog does not hold; the message lists the nearest."""


class UnknownTask(UnknownName):
    """No such task."""


class UnknownModel(UnknownName):
    """No such model for this task."""


class UnknownDataset(UnknownName):
    """No such named data set or split."""


# --- files and downloads ---------------------------------------------------------------------------------------------
class DownloadError(ZooError):
    """A file could not be fetched: no network, a refusal, a deadline that passed."""


class OfflineError(DownloadError):
    """The file is not on this machine and downloading is switched off."""


class ChecksumError(DownloadError):
    """The file that arrived is not the file that was published."""


class DiskFull(ZooError, OSError):
    """There is no room left to write a file. What was half-written has been removed."""


# --- weights ---------------------------------------------------------------------------------------------------------
class WeightsError(ZooError):
    """A weights file that cannot be used."""


class UnreadableWeights(WeightsError):
    """Truncated, damaged, or of a format that zoo does not read."""


class UnsafePickle(WeightsError):
    """A pickle that asks for more than tensors. Nothing of it was executed."""


class WeightsMismatch(WeightsError):
    """The weights are of another model: keys are missing or left over, or shapes differ."""


# --- data ------------------------------------------------------------------------------------------------------------
class DataError(ZooError):
    """Data that cannot be used."""


class BadImage(DataError):
    """A file that should be a picture and is not, or is damaged."""


class BadTable(DataError):
    """A csv or tsv without the columns that were asked for."""


class BadRecords(DataError):
    """A record file that is damaged or truncated."""


class UnfinishedRecords(BadRecords):
    """A record file whose writer never finished."""


class EmptyDataset(DataError):
    """A data set without a single sample."""


class CaptionTooLong(DataError):
    """A caption of more tokens than the model's context."""


# --- training --------------------------------------------------------------------------------------------------------
class SettingsError(ZooError, ValueError):
    """Settings that contradict each other, or that name something unknown."""


class BatchTooSmall(SettingsError):
    """A contrastive loss over one pair is always zero: nothing can be learnt."""


class HostfileError(SettingsError):
    """A hostfile that cannot be used; the message says which line."""


class LaunchError(ZooError):
    """A worker, a machine or a link that a run needs and that is not there."""


class DeviceNotFound(ZooError):
    """A device was asked for that this machine does not have."""


class CheckpointError(ZooError):
    """A checkpoint or run folder that cannot be resumed from."""


class TrainingDiverged(ZooError):
    """The loss is no longer a number."""


class Suspended(SystemExit):
    """A run was asked to stop, has saved, and goes on when the same command is started again. Exit code 75.

    75 is EX_TEMPFAIL of sysexits.h: try again later.
    """

    CODE = 75

    def __init__(self, why: str):
        super().__init__(self.CODE)
        self.why = why

    def __str__(self) -> str:
        return self.why


class MissingPackage(ZooError, ImportError):
    """A feature needs a package that is not installed; the message gives the command."""
