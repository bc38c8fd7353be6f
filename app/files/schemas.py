"""Files on the wire, and the form that uploads one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.files.limits import MAX_COLUMN_NAME
from app.files.tables import File

_UNITS = f'must be `record`, a column\'s name of at most {MAX_COLUMN_NAME} characters, or {{"column": name}}'


def _is_name(text: str) -> str:
    if not text.isprintable():
        raise ValueError(_UNITS)
    return text


class UnitColumn(BaseModel):
    """A privacy unit: all records that share a value of this column, or each record where it is null."""

    model_config = ConfigDict(extra="forbid")

    column: Annotated[str, Field(min_length=1, max_length=MAX_COLUMN_NAME), AfterValidator(_is_name)] | None


def unit_in(text: str | None) -> UnitColumn | None:
    """A privacy unit as the form has it: `record`, a column's name, or {"column": name} as JSON, which can also name a
    column `record`. None: nothing was said. ValueError for what is none of these."""
    if not text:
        return None
    if not text.isprintable():
        raise ValueError(_UNITS)
    try:
        if text.startswith("{"):
            return UnitColumn.model_validate_json(text)
        return UnitColumn(column=None if text == "record" else text)
    except ValidationError:
        raise ValueError(_UNITS) from None  # pydantic's own words quote it


def _is_unit(text: str) -> str:
    unit_in(text)
    return text


class UploadForm(BaseModel):
    """The form's fields beside the file itself, as text. A field that is none of these is refused: a misspelt one
    would silently protect less than was meant."""

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    purpose: str
    privacy_budget: Annotated[str, Field(max_length=64)] | None = None
    privacy_unit: Annotated[str, Field(max_length=256), AfterValidator(_is_unit)] | None = None
    #: How the wire's client spells {"privacy_unit": {"column": name}} in a form.
    privacy_unit_column: Annotated[
        Annotated[str, Field(min_length=1, max_length=MAX_COLUMN_NAME), AfterValidator(_is_name)] | None,
        Field(alias="privacy_unit[column]"),
    ] = None
    public: bool = False
    expires_after_anchor: Annotated[Literal["created_at"] | None, Field(alias="expires_after[anchor]")] = None
    expires_after_seconds: Annotated[int | None, Field(alias="expires_after[seconds]", ge=3600, le=2_592_000)] = None

    @model_validator(mode="after")
    def _one_unit(self) -> UploadForm:
        if self.privacy_unit and self.privacy_unit_column:
            raise ValueError("names two privacy units")
        return self

    def unit(self) -> UnitColumn | None:
        """The privacy unit; None: nothing was said."""
        if self.privacy_unit_column is not None:
            return UnitColumn(column=self.privacy_unit_column)
        return unit_in(self.privacy_unit)


class FileError(BaseModel):
    """What is wrong with a dataset, and where; never what was read."""

    code: str
    message: str
    line: int | None = None
    column: int | None = None
    row: int | None = None


class FileColumn(BaseModel):
    """A column of a processed dataset."""

    name: str
    type: str


class FileOut(BaseModel):
    """The wire's `file`, and ours after `status_details`. bytes_read: how far the reader is; of rows nothing is told
    before all are read."""

    id: str
    object: Literal["file"] = "file"
    bytes: int
    created_at: int
    expires_at: int | None
    filename: str
    purpose: str
    status: Literal["uploaded", "processed", "error"]
    status_details: str | None
    error: FileError | None
    bytes_read: int
    public: bool
    privacy_budget: str | None
    privacy_unit: Literal["record"] | UnitColumn | None
    num_units: int | None
    num_rows: int | None
    columns: list[FileColumn] | None


class FileUnits(BaseModel):
    """What the records per privacy unit come to, under a job's bound on them: counts of private rows, for admins."""

    object: Literal["file.units"] = "file.units"
    privacy_unit: Literal["record"] | UnitColumn | None
    num_units: int | None
    num_rows: int | None
    max_records_per_unit: int
    units_over_bound: int | None
    records_over_bound: int | None


class ReportColumn(BaseModel):
    """nulls: rows without a value. lengths: {quantile: characters}. counts, element_counts: {value: how often}, where
    values are few and short. range: smallest and largest number."""

    name: str
    type: str
    nulls: int
    lengths: dict[str, int] | None
    counts: dict[str, int] | None
    element_counts: dict[str, int] | None
    range: list[float] | None


class FileTruncation(BaseModel):
    """What a job cut of the rows, by its base's tokenizer. tokens: of all rows, what was cut included. cut: {text,
    tokens, source, target or chat: {rows, tokens}}, the rows that lost something and what they lost together."""

    job_id: str
    dataset: Literal["training", "validation"]
    model: str
    task: str
    max_length: int
    max_target_length: int | None
    rows: int
    tokens: int
    cut: dict[str, dict[str, int]]


class FileReport(BaseModel):
    """Exact figures of the rows, for the data's owner: nothing of it is private, and no budget covers it.

    records_per_unit: [[records, units, rows]], ascending; the last entry stands for all larger units, too.
    inferred_tasks: those that jobs can infer from the columns' names. duplicate_rows: rows that repeat an earlier one.
    truncation: what each of the latest jobs cut, once it has read the rows; the latest first.
    """

    object: Literal["file.report"] = "file.report"
    file_id: str
    private: Literal[False] = False
    notice: str = "Exact figures of raw rows: not private, not covered by any budget; for the data's owner only."
    num_rows: int
    num_units: int
    privacy_unit: Literal["record"] | UnitColumn | None
    records_per_unit: list[list[int]]
    inferred_tasks: list[str]
    duplicate_rows: int | None
    columns: list[ReportColumn]
    truncation: list[FileTruncation] = Field(default_factory=list)


class FileList(BaseModel):
    """A page of files."""

    object: Literal["list"] = "list"
    data: list[FileOut]
    has_more: bool


class FileDeleted(BaseModel):
    """The wire's answer to a delete."""

    id: str
    object: Literal["file"] = "file"
    deleted: Literal[True] = True


def render(file: File) -> FileOut:
    """The file as the wire has it: of the profile only names and types, which hold no counts and no classes. Where
    units are not records, the number of units is public, and that of the rows is not: it tells of records per unit."""
    error: dict[str, Any] | None = file.error
    return FileOut(
        id=file.id,
        bytes=file.bytes,
        created_at=int(file.created_at),
        expires_at=None if file.expires_at is None else int(file.expires_at),
        filename=file.filename,
        purpose=file.purpose,
        status=file.status,
        status_details=error["message"] if error else None,
        error=FileError(**error) if error else None,
        bytes_read=file.bytes_read,
        public=file.public,
        privacy_budget=file.budget_id,
        privacy_unit=_unit(file),
        num_units=file.num_units,
        num_rows=file.num_rows if file.unit_column is None else None,
        columns=[FileColumn(name=column["name"], type=column["type"]) for column in file.columns]
        if file.columns
        else None,
    )


def render_units(file: File, bound: int) -> FileUnits:
    """How much of the file a bound on records per unit leaves out of each step."""
    over = None
    if file.records_per_unit is not None:
        over = [(units, rows - bound * units) for records, units, rows in file.records_per_unit if records > bound]
    return FileUnits(
        privacy_unit=_unit(file),
        num_units=file.num_units,
        num_rows=file.num_rows,
        max_records_per_unit=bound,
        units_over_bound=None if over is None else sum(units for units, _ in over),
        records_over_bound=None if over is None else sum(records for _, records in over),
    )


def render_report(file: File, report: Mapping[str, Any], truncation: Sequence[Mapping[str, Any]]) -> FileReport:
    """The report as it was stored, with what it is of, and what jobs cut since."""
    cut = [FileTruncation(**each) for each in truncation]
    return FileReport(file_id=file.id, privacy_unit=_unit(file), truncation=cut, **report)


def _unit(file: File) -> Literal["record"] | UnitColumn | None:
    if file.public:
        return None
    return "record" if file.unit_column is None else UnitColumn(column=file.unit_column)
