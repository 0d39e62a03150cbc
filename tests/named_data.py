"""The nine named datasets, a few rows of each, laid out as their repositories on the Hub: files, columns, splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from datasets import ClassLabel, Features, Image, List, Value
from formats_data import picture, sound
from hub import COPY

STRING = Value("string")
MEDIA = {"bytes": Value("binary"), "path": STRING}
#: Rows of a split that is to be read.
NUM_ROWS = 3

LUMA_WORDS = ("seven", "zero", "three")
OPTIONS = ["none", "all", "some", "one"]


def rows_of(name: str) -> list[dict[str, Any]]:
    """The rows of one of them, as the Hub has its columns (LUMA: of its list)."""
    return [_ROWS[name](i) for i in range(NUM_ROWS)]


def write_named(root: Path, *names: str) -> None:
    """Their repositories, below the folder of a Hub; of all nine if none is named. The second places are not there."""
    for name in names or _WRITE:
        _WRITE[name](root)


def expected(name: str, i: int) -> dict[str, Any]:
    """What sample ``i`` of the first split has: prompt and answer, or text, or a class."""
    row = rows_of(name)[i]
    return {
        "beans": lambda: {"labels": i % 3},
        "clotho_aqa": lambda: {"prompt": row["question"] + "\n", "answer": row["answer"]},
        "ds1000": lambda: {"prompt": row["prompt"] + "\n", "answer": row["reference_code"]},
        "financial_phrasebank": lambda: {"text": row["sentence"], "labels": row["label"]},
        "humaneval": lambda: {"prompt": row["prompt"], "answer": row["canonical_solution"]},
        "logiqa": lambda: {
            "prompt": "\n".join([row["context"], row["query"], *OPTIONS]) + "\n",
            "answer": OPTIONS[row["correct_option"]],
        },
        "luma": lambda: {"text": LUMA_WORDS[i]},
        "open_platypus": lambda: {
            "prompt": row["instruction"] + "\n" + (row["input"] + "\n" if row["input"] else ""),
            "answer": row["output"],
        },
        "prosocial_dialog": lambda: {"prompt": row["context"] + "\n", "answer": row["response"]},
    }[name]()


_ROWS: dict[str, Any] = {
    "beans": lambda i: {"image_file_path": f"/x/{i}.png", "image": picture(i), "labels": i % 3},
    "clotho_aqa": lambda i: {
        "audio": sound(i),
        "question": f"Is it raining {i} times?",
        "answer": ("yes", "no")[i % 2],
    },
    "ds1000": lambda i: {
        "prompt": f"Problem:\nadd {i} to a frame\nA:\n<code>",
        "reference_code": f"df + {i}",
        "metadata": {"problem_id": i, "library": "Pandas"},
        "code_context": "import pandas",
    },
    "financial_phrasebank": lambda i: {"sentence": f"Profit rose by {i} % .", "label": (2, 1, 0)[i]},
    "humaneval": lambda i: {
        "task_id": f"HumanEval/{i}",
        "prompt": f'def f{i}(x):\n    """ Add {i}.\n    """\n',
        "entry_point": f"f{i}",
        "canonical_solution": f"    return x + {i}\n",
        "test": "",
        "docs": [{"text": "t", "title": "t"}],
    },
    "logiqa": lambda i: {
        "context": f"There are {i} men.",
        "query": "How many are mortal?",
        "options": OPTIONS,
        "correct_option": (i + 1) % 4,
    },
    "luma": lambda i: {"path": f"{('re', 'cv')[i % 2]}_audio/{i}.wav", "label": LUMA_WORDS[i], "tts_label": "eleven"},
    "open_platypus": lambda i: {
        "input": "" if i != 1 else "x = 2",
        "output": f"It is {i}.",
        "instruction": f"What is {i} + x?",
        "data_source": "MATH/PRM-800K",
    },
    "prosocial_dialog": lambda i: {
        "context": f"I took {i} of them.",
        "response": f"You should not take {i}, é.",
        "rots": ["It is wrong to take."],
        "safety_label": "__needs_caution__",
        "safety_annotations": [],
        "safety_annotation_reasons": [],
        "source": "socialchemistry",
        "etc": None,
        "dialogue_id": i,
        "response_id": 0,
        "episode_done": False,
    },
}


def _parquet(path: Path, rows: list[dict[str, Any]], features: dict[str, Any] | None = None, **media: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    for column in media:
        rows = [{**row, column: {"bytes": row[column], "path": f"{i}.x"}} for i, row in enumerate(rows)]
    made = datasets.Dataset.from_list(
        rows, features=None if features is None else Features({**features, **dict.fromkeys(media, MEDIA)})
    )
    if features is not None:
        made = made.cast(Features({**features, **media}))
    made.to_parquet(path)


def _beans(root: Path) -> None:
    labels = ClassLabel(names=["angular_leaf_spot", "bean_rust", "healthy"])
    features = {"image_file_path": STRING, "image": Image(), "labels": labels}
    for split in ("train", "validation", "test"):
        path = root / f"AI-Lab-Makerere/beans/data/{split}-00000-of-00001.parquet"
        _parquet(path, rows_of("beans"), features, image=Image())


def _clotho(root: Path) -> None:
    folder = root / "lmms-lab/ClothoAQA"
    features = {"audio": datasets.Audio(), "question": STRING, "answer": STRING}
    splits = ("clotho_aqa_val_filtered", "clotho_aqa_test_filtered")
    for split in splits:
        path = folder / f"clotho_aqa/{split}-00000-of-00001.parquet"
        _parquet(path, rows_of("clotho_aqa"), features, audio=datasets.Audio())
    files = "".join(f"  - split: {split}\n    path: clotho_aqa/{split}-*\n" for split in splits)
    other = "- config_name: clotho_asqa_test_v2\n  data_files:\n  - split: test\n    path: clotho_asqa_test_v2/test-*\n"
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: clotho_aqa\n  data_files:\n{files}{other}---\n")


def _json(root: Path, repo: str, file: str, split: str, name: str) -> None:
    """Lines of JSON, and the copy that the Hub has made of them."""
    path = root / repo / file
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows_of(name)))
    _parquet(root / ".parquet" / repo / "default" / split / "0000.parquet", rows_of(name))


def _script(root: Path, repo: str, copies: dict[str, Any], features: dict[str, Any], name: str) -> None:
    """A loading script, and the copy of what it yields: configuration → splits."""
    path = root / repo / f"{repo.rpartition('/')[2]}.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("raise SystemExit('never run')\n")
    for config, splits in copies.items():
        for split in splits:
            _parquet(root / ".parquet" / repo / config / split / "0000.parquet", rows_of(name), features)


def _financial(root: Path) -> None:
    features = {"sentence": STRING, "label": ClassLabel(names=["negative", "neutral", "positive"])}
    copies = dict.fromkeys(("sentences_50agree", "sentences_66agree", "sentences_allagree"), ("train",))
    _script(root, "takala/financial_phrasebank", copies, features, "financial_phrasebank")


def _logiqa(root: Path) -> None:
    features = {"context": STRING, "query": STRING, "options": List(STRING), "correct_option": Value("int32")}
    _script(root, "lucasmccabe/logiqa", {"default": ("train", "validation", "test")}, features, "logiqa")


def _luma(root: Path) -> None:
    folder = root / "bezirganyan/LUMA/audio"
    lines = ["path,label,tts_label"]
    for i, row in enumerate(rows_of("luma")):
        lines.append(",".join(row.values()))
        (folder / row["path"]).parent.mkdir(parents=True, exist_ok=True)
        (folder / row["path"]).write_bytes(sound(i))
    (folder / "datalist.csv").write_text("\n".join(lines) + "\n")


def _platypus(root: Path) -> None:
    path = root / "garage-bAInd/Open-Platypus/data/train-00000-of-00001.parquet"
    _parquet(path, rows_of("open_platypus"))


def _prosocial(root: Path) -> None:
    for file, split in (("train.json", "train"), ("valid.json", "validation"), ("test.json", "test")):
        _json(root, "allenai/prosocial-dialog", file, split, "prosocial_dialog")


_WRITE = {
    "beans": _beans,
    "clotho_aqa": _clotho,
    "ds1000": lambda root: _json(root, "xlangai/DS-1000", "test.jsonl", "test", "ds1000"),
    "financial_phrasebank": _financial,
    "humaneval": lambda root: _json(root, "code-rag-bench/humaneval", "humaneval.json", "train", "humaneval"),
    "logiqa": _logiqa,
    "luma": _luma,
    "open_platypus": _platypus,
    "prosocial_dialog": _prosocial,
}
assert COPY == "refs/convert/parquet"
