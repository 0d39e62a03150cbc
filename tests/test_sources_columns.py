"""Which columns of a dataset make a sample."""

from __future__ import annotations

import logging

import pytest
from datasets import Audio, ClassLabel, Features, Image, List, Value

from shmloader.errors import ColumnError
from shmloader.sources.columns import choose_columns

STRING, INT, BYTES = Value("string"), Value("int64"), Value("binary")
CHAT = List({"role": STRING, "content": STRING})
SHAREGPT = List({"from": STRING, "value": STRING})
DECODED = {"array": List(Value("float32")), "sampling_rate": INT}


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
        {"words": List(STRING), "tags": List(STRING)},
        {"one": Audio(), "other": Audio()},
        {"chosen": CHAT, "rejected": CHAT},
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


def roles(features: dict[str, object], columns: dict[str, object] | None = None) -> dict[str, object]:
    found, _, _ = choose_columns(Features(features), columns, dataset="d")
    return {role: value for role, value in vars(found).items() if value is not None}


def test_audio_is_recognised_and_its_unusual_strings_are_not_the_text():
    features = {"audio": Audio(), "label": ClassLabel(names=["a"]), "speaker": STRING, "path": STRING}
    assert roles(features) == {"audio": "audio", "labels": "label", "class_names": ("a",)}


def test_audio_with_a_transcript_uses_both():
    columns, needed, notices = choose_columns(Features(clip=Audio(), sentence=STRING), dataset="d")
    assert (columns.text, columns.audio) == ("sentence", "clip")
    assert needed == ("sentence", "clip")
    assert notices == ("d: text from column 'sentence', audio from column 'clip'",)


def test_decoded_audio_is_recognised():
    assert roles({"speech": DECODED}) == {"audio": "speech"}


def test_audio_beside_an_image_uses_both():
    assert roles({"sound": Audio(), "frame": Image()}) == {"audio": "sound", "image": "frame"}


@pytest.mark.parametrize(
    "kind", [CHAT, SHAREGPT, {"role": List(STRING), "content": List(STRING)}], ids=["openai", "sharegpt", "lists"]
)
@pytest.mark.parametrize("name", ["messages", "turns"])
def test_conversation_is_the_text_where_no_plain_text_is(kind, name):
    assert roles({"id": STRING, name: kind}) == {"text": name}
    assert roles({"id": STRING, name: kind, "text": STRING}) == {"text": "text"}


def test_list_of_strings_is_the_text_by_a_conversation_s_name_or_where_there_is_no_other():
    assert roles({"dialog": List(STRING), "id": STRING}) == {"text": "dialog"}
    assert roles({"words": List(List(STRING)), "n": INT}) == {"text": "words"}
    assert roles({"words": List(STRING), "verse": STRING}) == {"text": "verse"}


def test_members_of_a_webdataset_are_known_and_where_it_comes_from_is_no_text():
    features = {"__key__": STRING, "__url__": STRING, "jpg": Image(), "txt": STRING, "cls": INT}
    assert roles(features) == {"image": "jpg", "text": "txt", "labels": "cls"}
    assert roles({"__key__": STRING, "__url__": STRING, "verse": STRING}) == {"text": "verse"}


NESTED = {
    "answers": {"text": List(STRING), "start": List(INT)},
    "turns": List({"said": STRING, "photo": Image()}),
    "meta": {"photo": Image(), "clip": Audio(), "kind": ClassLabel(names=["a", "b"]), "raw": BYTES},
    "meta.title": STRING,
}


def test_columns_inside_columns_are_named_by_their_path():
    given = {"text": ["answers.text", "turns.said", "meta.title"], "image": "meta.photo", "labels": "meta.kind"}
    columns, needed, notices = choose_columns(Features(NESTED), given, dataset="d")
    assert columns.text == ("answers.text", "turns.said", "meta.title")
    assert columns.class_names == ("a", "b")
    assert needed == ("answers", "turns", "meta.title", "meta")
    assert notices[0].startswith("d: text from columns 'answers.text', 'turns.said', 'meta.title', image from column")
    assert roles(NESTED, {"audio": "meta.clip"}) == {"audio": "meta.clip"}
    assert roles(NESTED, {"audio": "meta.raw"}) == {"audio": "meta.raw"}


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": "answers.txt"}, r"no column 'answers.txt' \(did you mean 'answers.text'\?\)"),
        ({"text": "answers.start"}, "cannot be used as text"),
        ({"image": "turns.photo"}, "lies inside a list, cannot be used as image"),
        ({"text": "meta"}, "cannot be used as text"),
        ({"text": []}, "is empty"),
        ({"text": ["meta.title", 5]}, "text must be the name of a column, or a list of such, but is 5"),
        ({"image": ["meta.photo"]}, r"image must be the name of a column, but is \['meta.photo'\]"),
        ({"audio": "meta.photo"}, "cannot be used as audio"),
    ],
)
def test_bad_path_is_an_error_that_lists_what_there_is_inside(columns, said):
    with pytest.raises(ColumnError, match=said) as caught:
        roles(NESTED, columns)
    assert "answers: {text: List(string), start: List(int64)}" in str(caught.value)
    assert "turns: List({said: string, photo: Image})" in str(caught.value)


def test_user_columns_are_used_exactly():
    features = {"text": STRING, "sentence": STRING, "label": INT, "image": Image()}
    assert chosen(features, {"text": "sentence"}) == ("sentence", None, None)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"text": "txt"}, "no column 'txt'"),
        ({"texts": "text"}, "'texts' is no role"),
        ({"audio": "text"}, "cannot be used as audio"),
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


def test_media_that_no_sample_gets_are_told():
    features = Features(text=STRING, pages=List(Image()), meta={"clip": List({"sound": Audio()})}, id=INT)
    _, _, notices = choose_columns(features, dataset="d")
    assert notices == (
        "d: text from column 'text'",
        "d: not used, although it holds images, audio or the like: 'pages' (List(Image)), "
        "'meta' ({clip: List({sound: Audio})})",
    )
    assert len(choose_columns(Features(text=STRING, image=Image(), id=INT), dataset="d")[2]) == 1
    unused = choose_columns(Features(text=STRING, image=Image()), {"text": "text"}, dataset="d")[2][1]
    assert unused.endswith("'image' (Image)")


CHOICE = {
    "q": Value("string"),
    "options": List(Value("string")),
    "right": Value("int32"),
    "deep": {"choices": List(Value("string")), "gold": Value("string")},
    "score": Value("float32"),
}


def test_target_is_read_beside_its_text():
    chosen, needed, notices = choose_columns(CHOICE, {"text": "q", "target": "options[right]"}, dataset="d")
    assert (chosen.text, chosen.target) == ("q", "options[right]")
    assert needed == ("q", "options", "right")
    assert "target from column 'options[right]'" in notices[0]


def test_choice_may_lie_inside_columns():
    _, needed, _ = choose_columns(CHOICE, {"text": "q", "target": "deep.choices[deep.gold]"}, dataset="d")
    assert needed == ("q", "deep")


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"target": "q", "image": "q"}, "cannot be used as image|no text that it is the answer to"),
        ({"target": "q"}, "no text that it is the answer to"),
        ({"text": "q", "target": "q", "labels": "right"}, "names target and labels"),
        ({"text": "q", "target": "score"}, "cannot be used as target"),
        ({"text": "q", "target": "options[score]"}, r"no column 'options\[score\]'.*list\[number\]"),
        ({"text": "q", "target": "q[right]"}, r"no column 'q\[right\]'"),
        ({"text": "q", "target": ["q", "q"]}, "target must be the name of a column"),
    ],
)
def test_target_that_cannot_be_meant_is_an_error(columns, said):
    with pytest.raises(ColumnError, match=said):
        choose_columns(CHOICE, columns, dataset="d")
