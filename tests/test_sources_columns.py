"""Which columns of a dataset make a sample."""

from __future__ import annotations

import logging

import pytest
from datasets import Audio, ClassLabel, Features, Image, List, Value

from shmloader.errors import ColumnError
from shmloader.sources.columns import choose_columns

STRING, INT = Value("string"), Value("int64")


def chosen(features: dict[str, object], columns: dict[str, str] | None = None) -> tuple[str | None, ...]:
    found, _, _ = choose_columns(Features(features), columns, dataset="d")
    return found.text, found.image, found.labels


def test_image_and_classlabel_features_are_recognised_with_their_class_names():
    features = Features(file=STRING, picture=Image(), kind=ClassLabel(names=["cat", "dog"]))
    columns, needed, _ = choose_columns(features, dataset="d")
    assert (columns.text, columns.image, columns.labels) == (None, "picture", "kind")
    assert columns.class_names == ("cat", "dog")
    assert needed == ("picture", "kind")


@pytest.mark.parametrize("name", ["text", "sentence", "content", "document", "prompt", "instruction", "question"])
def test_usual_text_column_is_recognised_among_other_strings(name):
    assert chosen({"id": STRING, name: STRING, "source": STRING})[0] == name


def test_text_column_name_is_recognised_in_any_case():
    assert chosen({"Id": STRING, "Text": STRING})[0] == "Text"


def test_better_name_wins_over_a_less_usual_one():
    assert chosen({"question": STRING, "text": STRING})[0] == "text"


def test_only_string_column_is_the_text_whatever_its_name():
    assert chosen({"verse": STRING, "n": INT})[0] == "verse"


def test_unusual_string_column_beside_an_image_is_not_the_text():
    assert chosen({"image_file_path": STRING, "image": Image()}) == (None, "image", None)


def test_caption_beside_an_image_is_the_text():
    assert chosen({"caption": STRING, "image": Image()}) == ("caption", "image", None)


@pytest.mark.parametrize("name", ["label", "labels"])
def test_integer_column_named_label_serves_as_labels(name):
    assert chosen({"text": STRING, name: Value("int32")})[2] == name


def test_integer_column_of_another_name_is_not_labels():
    assert chosen({"text": STRING, "score": INT})[2] is None


def test_classlabel_named_label_wins_over_other_classlabels():
    kind = ClassLabel(names=["a", "b"])
    assert chosen({"image": Image(), "coarse": kind, "label": kind})[2] == "label"


@pytest.mark.parametrize(
    "features",
    [
        {"sentence": STRING, "content": STRING},
        {"left": Image(), "right": Image()},
        {"image": Image(), "fine": ClassLabel(names=["a"]), "coarse": ClassLabel(names=["a"])},
        {"a": STRING, "b": STRING},
        {"n": INT, "m": INT},
        {"words": List(STRING)},
    ],
)
def test_ambiguous_or_unusable_columns_are_an_error_that_lists_them_and_the_remedy(features):
    with pytest.raises(ColumnError) as caught:
        chosen(features)
    message = str(caught.value)
    assert all(name in message for name in features)
    assert "process=" in message
    assert caught.value.columns == list(features)
    assert caught.value.dataset == "d"


def test_ambiguity_shows_a_columns_argument_that_works():
    features = {"left": Image(), "right": Image(), "label": INT}
    with pytest.raises(ColumnError, match=r"columns=\{'image': 'left', 'labels': 'label'\}"):
        chosen(features)
    assert chosen(features, {"image": "left", "labels": "label"}) == (None, "left", "label")


def test_audio_without_text_or_image_says_that_audio_is_not_supported_yet():
    with pytest.raises(ColumnError, match="audio columns are not supported yet"):
        chosen({"audio": Audio(), "label": ClassLabel(names=["a"]), "speaker": STRING, "path": STRING})


def test_audio_with_a_transcript_uses_the_transcript_and_says_what_is_left_out():
    columns, needed, notices = choose_columns(Features(audio=Audio(), sentence=STRING), dataset="d")
    assert columns.text == "sentence"
    assert needed == ("sentence",)
    assert "not supported yet: audio" in notices[0]


def test_user_columns_are_used_exactly():
    features = {"text": STRING, "sentence": STRING, "label": INT, "image": Image()}
    assert chosen(features, {"text": "sentence"}) == ("sentence", None, None)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": "txt"}, "no column 'txt'"),
        ({"texts": "text"}, "'texts' is no role"),
        ({"audio": "text"}, "not supported yet"),
        ({"labels": "label"}, "neither text nor image"),
        ({"text": "label"}, "cannot be used as text"),
        ({"image": "text"}, "cannot be used as image"),
        ({"text": "text", "labels": "other"}, "cannot be used as labels"),
        ({}, "neither text nor image"),
    ],
)
def test_bad_user_columns_are_an_error_that_says_what_is_wrong(columns, said):
    with pytest.raises(ColumnError, match=said):
        chosen({"text": STRING, "other": STRING, "label": INT}, columns)


def test_all_columns_are_read_and_none_chosen_when_the_user_takes_whole_rows():
    columns, needed, _ = choose_columns(Features(a=INT, b=INT), dataset="d", all_columns=True)
    assert (columns.text, columns.image, columns.labels) == (None, None, None)
    assert needed == ("a", "b")


def test_choice_is_reported_in_one_line_and_logged(caplog):
    features = Features(image=Image(), label=ClassLabel(names=["a", "b", "c"]))
    with caplog.at_level(logging.INFO, logger="shmloader.sources"):
        _, _, notices = choose_columns(features, dataset="org/name")
    assert notices == ("org/name: image from column 'image', labels from column 'label', 3 classes",)
    assert notices[0] in caplog.text
