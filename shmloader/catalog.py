"""The named datasets: what a short name stands for, as data."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from shmloader.errors import OptionError

#: What of a row can be used for what; "target" is the answer to "text".
ROLES = ("text", "target", "image", "audio", "labels")
TASK_TYPES = ("text", "vision", "audio", "vision_text", "audio_text")

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Repo:
    """A place where a named dataset lies: a Hub id, or a local folder.

    configuration: of several that it has ("sentences_allagree"). revision: None: the main branch.
    splits: which split, in the syntax of ``datasets`` ("train[95%:]"), is used in the place of one that is asked for
        and that it lacks; one that is not named here is taken as it is.
    columns: role → column, where they are called otherwise than in the dataset's other places; None: as there.
    data_files: which of its files hold the rows, where `datasets` would take others; as ``load_dataset`` takes it.
    has: the splits that it is known to have, to be shown; nothing depends on it.
    """

    id: str
    configuration: str | None = None
    revision: str | None = None
    splits: Mapping[str, str] = field(default_factory=dict)
    columns: Mapping[str, Any] | None = None
    data_files: Any = None
    has: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.id, str) or not self.id.strip():
            raise _bad("Repo", "id", self.id, "a Hub id (owner/name), or the path of a folder or file")
        if not _is_text_map(self.splits):
            raise _bad("Repo", "splits", self.splits, "a dict of split → split that is used in its place")
        for split in self.splits:
            if not re.fullmatch(r"\w+(\.\w+)*", split):
                raise _bad("Repo", "splits", self.splits, f"named by plain splits, which {split!r} is not")
        if self.columns is not None:
            _check_columns("Repo", self.columns)

    @property
    def load(self) -> dict[str, Any]:
        """What `datasets` is to be told beside the id: ``name``, ``revision``, ``data_files``."""
        told = {"name": self.configuration, "revision": self.revision, "data_files": self.data_files}
        return {key: value for key, value in told.items() if value is not None}


@dataclass(frozen=True)
class DatasetConfig:
    """What a short name stands for.

    name: as ``dataset_name=`` and every sample's ``source`` have it. repos: where it lies; the first that exists is
        taken; one may be given as itself, or as its id alone.
    columns: role ("text", "target", "image", "audio", "labels") → column; "target" is the answer to "text". Empty:
        they are recognised.
    task_type: of its samples: "text", "vision", "audio", "vision_text" or "audio_text"; None: what its columns say.
    class_names: of the classes that ``labels`` numbers, where it has them.
    licence: as its card names it, and what to know about it. aliases: further names for it. about: one line.
    process: takes whole rows, in place of the columns, as the constructors' ``process``, which comes before it.

    Raises:
        OptionError: a bad value.
    """

    name: str
    repos: tuple[Repo, ...]
    columns: Mapping[str, Any] = field(default_factory=dict)
    task_type: str | None = None
    class_names: tuple[str, ...] = ()
    licence: str = ""
    aliases: tuple[str, ...] = ()
    about: str = ""
    process: Callable[[dict[str, Any]], Mapping[str, Any]] | None = None

    def __post_init__(self) -> None:
        for name in (self.name, *_listed("aliases", self.aliases)):
            if not isinstance(name, str) or not _NAME.fullmatch(name) or key_of(name) in ("auto", "all"):
                raise _bad(
                    "DatasetConfig", "name", name, "a word of letters, digits, _, - and dots, and not 'auto' or 'all'"
                )
        repos = tuple(Repo(r) if isinstance(r, str) else r for r in _listed("repos", self.repos))
        if not repos or not all(isinstance(repo, Repo) for repo in repos):
            raise _bad("DatasetConfig", "repos", self.repos, "a Hub id or folder, a Repo, or a list of these")
        _check_columns("DatasetConfig", self.columns)
        if self.process is not None and not callable(self.process):
            raise _bad("DatasetConfig", "process", self.process, "a function of a row, or None")
        derived = None if self.process or not self.columns else _task_type(self.columns)
        if self.task_type is not None and self.task_type not in TASK_TYPES:
            raise _bad("DatasetConfig", "task_type", self.task_type, f"one of {', '.join(TASK_TYPES)}, or None")
        if derived is not None and self.task_type not in (None, derived):
            raise _bad("DatasetConfig", "task_type", self.task_type, f"{derived!r}, which its columns make, or None")
        for name, value in (
            ("repos", repos),
            ("task_type", self.task_type or derived),
            ("aliases", tuple(_listed("aliases", self.aliases))),
            ("class_names", tuple(_listed("class_names", self.class_names))),
        ):
            object.__setattr__(self, name, value)

    @property
    def keys(self) -> tuple[str, ...]:
        """The names that it is found by, as `key_of` writes them."""
        return tuple(dict.fromkeys(map(key_of, (self.name, *self.aliases))))


def key_of(name: str) -> str:
    """A short name as it is looked for: "Open-Platypus" is "open_platypus"."""
    return name.strip().lower().replace("-", "_")


def _task_type(columns: Mapping[str, Any]) -> str:
    """Of the samples that are made of these columns."""
    for role, alone in (("image", "vision"), ("audio", "audio")):
        if role in columns:
            return f"{alone}_text" if "text" in columns else alone
    return "text"


def _listed(name: str, value: Any) -> list[Any]:
    if isinstance(value, str | Repo):
        return [value]
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise _bad("DatasetConfig", name, value, "one, or a list of them")
    return list(value)


def _check_columns(kind: str, columns: Any) -> None:
    allowed = f"a dict of role → column, of the roles {', '.join(ROLES)}"
    if not isinstance(columns, Mapping) or set(columns) - set(ROLES):
        raise _bad(kind, "columns", columns, allowed)
    for column in columns.values():
        several = column if isinstance(column, list | tuple) else (column,)
        if not several or not all(isinstance(each, str) and each for each in several):
            raise _bad(kind, "columns", columns, allowed)
    if "target" in columns and ("text" not in columns or "labels" in columns):
        raise _bad(kind, "columns", columns, "with text beside target, and without labels, which target makes")


def _is_text_map(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(each, str) for pair in value.items() for each in pair)


def _bad(kind: str, name: str, value: Any, allowed: str) -> OptionError:
    return OptionError(
        f"{kind}: {name}={value!r} is not valid: it must be {allowed}", name=name, value=repr(value), allowed=allowed
    )


#: Splits of what has but one: the last 5 % of it, for want of others.
_TRAIN_ONLY = {"validation": "train[95%:]", "test": "train[95%:]"}
_TEST_ONLY = {"train": "test", "validation": "test[95%:]"}

#: The built-in ones, in the order of their names; "all" are these. Ids, configurations, columns and splits are those
#: of the datasets' cards, files and viewers on the Hub; where they are not told there, the comment says from where.
BUILT_IN: tuple[DatasetConfig, ...] = (
    DatasetConfig(
        name="beans",
        repos=(Repo("AI-Lab-Makerere/beans", has=("train", "validation", "test")),),
        columns={"image": "image", "labels": "labels"},
        class_names=("angular_leaf_spot", "bean_rust", "healthy"),
        licence="mit",
        about="photographs of bean leaves, healthy or with one of two diseases",
    ),
    # Its one complete test set with audio; the Hub has no training split of it with audio. Columns: of the Hub's files
    # of the same uploader (pbcong/ClothoAQA), and of the card of AudioLLMs/clotho_aqa_test.
    DatasetConfig(
        name="clotho_aqa",
        repos=(
            Repo(
                "lmms-lab/ClothoAQA",
                configuration="clotho_aqa",
                splits={
                    "train": "clotho_aqa_val_filtered",
                    "validation": "clotho_aqa_val_filtered",
                    "test": "clotho_aqa_test_filtered",
                },
                has=("clotho_aqa_val_filtered", "clotho_aqa_test_filtered"),
            ),
            Repo(
                "AudioLLMs/clotho_aqa_test",
                splits=_TEST_ONLY,
                columns={"audio": "context", "text": "instruction", "target": "answer"},
                has=("test",),
            ),
        ),
        columns={"audio": "audio", "text": "question", "target": "answer"},
        licence="none on the card; the clips are Freesound's, each with its own Creative Commons licence",
        aliases=("clothoaqa",),
        about="everyday sounds, a question about each, and the answer",
    ),
    DatasetConfig(
        name="ds1000",
        repos=(
            Repo("xlangai/DS-1000", splits=_TEST_ONLY, has=("test",)),
            Repo("code-rag-bench/ds1000", splits={"test": "train", "validation": "train[95%:]"}, has=("train",)),
        ),
        columns={"text": "prompt", "target": "reference_code"},
        licence="cc-by-sa-4.0",
        aliases=("ds_1000",),
        about="problems of data science, and Python that solves them; a test set",
    ),
    DatasetConfig(
        name="financial_phrasebank",
        # A loading script; its Parquet copy has the configurations sentences_50agree, _66agree, _75agree, _allagree.
        repos=(
            Repo("takala/financial_phrasebank", configuration="sentences_allagree", splits=_TRAIN_ONLY, has=("train",)),
        ),
        columns={"text": "sentence", "labels": "label"},
        class_names=("negative", "neutral", "positive"),
        licence="cc-by-nc-sa-3.0: not for commercial use",
        about="sentences of financial news, and whether they are good news",
    ),
    DatasetConfig(
        name="humaneval",
        repos=(
            Repo("code-rag-bench/humaneval", splits={"test": "train", "validation": "train[95%:]"}, has=("train",)),
            Repo("openai/openai_humaneval", splits=_TEST_ONLY, has=("test",)),
        ),
        columns={"text": "prompt", "target": "canonical_solution"},
        licence="cc-by-sa-4.0 (code-rag-bench/humaneval), mit (openai/openai_humaneval)",
        aliases=("openai_humaneval",),
        about="signatures and docstrings of Python functions, and their bodies; a test set",
    ),
    DatasetConfig(
        name="logiqa",
        # A loading script; by it, correct_option is the number of the right one among options.
        repos=(Repo("lucasmccabe/logiqa", has=("train", "validation", "test")),),
        columns={"text": ("context", "query", "options"), "target": "options[correct_option]"},
        licence="none on the card; the data it is made of is given as cc-by-nc-sa-4.0 elsewhere (AGIEval)",
        aliases=("logicqa",),
        about="questions of logic about a text, with four answers each, and the right one",
    ),
    DatasetConfig(
        name="luma",
        # The list of the clips; what datasets finds by itself is the clips alone, a part of them, without their words.
        # It is not split on the Hub.
        repos=(
            Repo(
                "bezirganyan/LUMA",
                data_files="audio/datalist.csv",
                splits={"validation": "test", "test": "train[95%:]"},
                has=("train",),
            ),
        ),
        columns={"audio": "path", "text": "label"},
        licence="cc-by-sa-4.0; the clips are from Common Voice (CC0), LibriSpeech (CC BY 4.0), Spoken Wikipedia and "
        "its authors' own (both CC BY-SA 4.0)",
        about="spoken names of 50 things, and the word that is said",
    ),
    DatasetConfig(
        name="open_platypus",
        repos=(Repo("garage-bAInd/Open-Platypus", splits=_TRAIN_ONLY, has=("train",)),),
        columns={"text": ("instruction", "input"), "target": "output"},
        licence="its card names that of each part; ReClor and ScienceQA are not for commercial use",
        aliases=("openplatypus", "platypus"),
        about="questions of science and logic, and answers with their reasoning",
    ),
    DatasetConfig(
        name="prosocial_dialog",
        repos=(Repo("allenai/prosocial-dialog", has=("train", "validation", "test")),),
        columns={"text": "context", "target": "response"},
        licence="cc-by-4.0",
        about="problematic statements, and responses that keep to social norms",
    ),
)

#: What ``dataset_name="auto"`` is, by ``task_type``.
BY_TASK: Mapping[str | None, str] = {
    None: "open_platypus",
    "audio": "luma",
    "code": "humaneval",
    "code-generation": "humaneval",
    "financial": "financial_phrasebank",
    "stock": "financial_phrasebank",
    "text": "open_platypus",
    "vision": "beans",
}
