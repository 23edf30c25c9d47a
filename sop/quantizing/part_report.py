"""What the file of a finished matrix says about itself, for the run that joins all of them."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from golden.checkpoint import Checkpoint
from golden.errors import InputError
from golden.metrics import Fidelity
from sop.shared.json_fields import count_field, json_object, number_field, shown, text_field

__all__ = ["FeedbackErrors", "PartReport"]

_MAX_GAP_PPM = 2e6  # ACos = -1


@dataclass(frozen=True)
class FeedbackErrors:
    """How error feedback went, as :class:`golden.feedback.Feedback` without its tensor.

    Attributes
    ----------
    feedback_error, plain_error : float
        H-weighted errors with and without it.
    used : bool
        Whether it is better than none.
    """

    feedback_error: float
    plain_error: float
    used: bool

    @classmethod
    def from_json(cls, value: object, where: str) -> "FeedbackErrors":
        """Check what ``asdict`` gave."""
        table = json_object(value, where)
        used = table.get("used")
        if type(used) is not bool:
            raise InputError(f"{where}: field 'used': must be true or false, not {shown(used)}")
        return cls(
            feedback_error=number_field(table, "feedback_error", where),
            plain_error=number_field(table, "plain_error", where),
            used=used,
        )


@dataclass(frozen=True)
class PartReport:
    """Configuration of the file of one matrix.

    Attributes
    ----------
    run : str
        Hash of what the whole run depends on.
    fidelity : Fidelity
    feedback : FeedbackErrors or None
        None where the second moment of the inputs is not known.
    """

    run: str
    fidelity: Fidelity
    feedback: FeedbackErrors | None

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values."""
        report = {"run": self.run, "fidelity": asdict(self.fidelity)}
        return report if self.feedback is None else report | {"feedback": asdict(self.feedback)}

    @classmethod
    def of_part(cls, part: Checkpoint, run: str) -> "PartReport":
        """What a finished part says, if it is of this run.

        Raises
        ------
        InputError
            If it is of another one, or a field is wrong.
        """
        if part.config.get("run") != run:
            raise InputError(f"{part.path}: of another run; remove {part.path.parent}")
        return cls.from_json(part.config, str(part.path))

    @classmethod
    def from_json(cls, value: Mapping[str, Any], where: str) -> "PartReport":
        """Check what :meth:`to_json` gave; InputErrors start with `where` and name the field."""
        place = f"{where}: fidelity"
        table = json_object(value.get("fidelity"), place)
        fidelity = Fidelity(
            weights=count_field(table, "weights", place, 1),
            gap_ppm=number_field(table, "gap_ppm", place, _MAX_GAP_PPM),
            plain_gap_ppm=number_field(table, "plain_gap_ppm", place, _MAX_GAP_PPM),
            squared_error=number_field(table, "squared_error", place),
            power=number_field(table, "power", place),
            replaced_norms=count_field(table, "replaced_norms", place),
        )
        feedback = None
        if "feedback" in value:
            feedback = FeedbackErrors.from_json(value["feedback"], f"{where}: feedback")
        return cls(text_field(value, "run", where), fidelity, feedback)
