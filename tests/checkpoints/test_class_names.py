import json
import re
import tracemalloc

import numpy as np
import pytest

from mvar_jax.checkpoints.class_names import ClassNames, class_names_of, imagenet_spellings
from mvar_jax.errors import InputError

IMAGENET = ClassNames(imagenet_spellings())


@pytest.mark.parametrize(
    ("number", "name"),
    [
        (0, "tench"),
        (1, "goldfish"),
        (207, "golden retriever"),
        (281, "tabby"),
        (360, "otter"),
        (388, "giant panda"),
        (417, "balloon"),
        (970, "alp"),
        (980, "volcano"),
        (999, "toilet tissue"),
    ],
)
def test_imagenet_names_are_in_the_order_of_the_labels(number, name):
    assert IMAGENET.names[number] == name
    assert IMAGENET.find(name) == number


def test_imagenet_has_1000_classes_in_the_order_of_wordnet():
    wordnet = [numbers for *_, numbers in imagenet_spellings()]
    assert len(wordnet) == len(set(wordnet)) == 1000 and wordnet == sorted(wordnet)
    assert all(name and name == name.strip() for spellings in imagenet_spellings() for name in spellings)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Golden_Retriever", 207),
        ("tabby cat", 281),
        ("n02099601", 207),
        ("cardigan", 474),  # 264 is "Cardigan", the dog
        ("Cardigan", 264),
        ("missile", 657),  # another name of 744
        ("giant panda", 388),
    ],
)
def test_other_spellings_find_the_class(text, number):
    assert IMAGENET.find(text) == number


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("golden retreiver", ["'golden retreiver'", "Did you mean golden retriever (207)?"]),
        ("crane", ["134 (crane)", "517 (crane)"]),
        ("panda", ["387 (lesser panda)", "388 (giant panda)"]),
        ("CARDIGAN", ["264 (Cardigan)", "474 (cardigan)"]),
        ("xqzw", ["class names or numbers", "'xqzw'"]),
    ],
)
def test_unknown_and_shared_names_are_refused_with_the_nearest(text, words):
    with pytest.raises(InputError) as refusal:
        IMAGENET.find(text)
    assert refusal.value.field == "labels" and refusal.value.given == text
    assert all(word in str(refusal.value) for word in words), refusal.value


def test_labels_mix_names_numbers_and_ranges():
    assert IMAGENET.numbers_of("golden retriever, 207,3-5").tolist() == [207, 207, 3, 4, 5]
    assert IMAGENET.numbers_of(["golden retriever", 207, "3-5"]).tolist() == [207, 207, 3, 4, 5]
    with pytest.raises(InputError, match="labels must be class numbers .*, got 'golden retriever'"):
        ClassNames().numbers_of("golden retriever")


@pytest.mark.parametrize("names", [IMAGENET, ClassNames()])
def test_range_beyond_the_model_is_refused_before_it_is_built(names):
    tracemalloc.start()
    with pytest.raises(InputError, match="labels must be class numbers from 0 to .*, got 3000000"):
        names.numbers_of("0-3000000")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1e6


# names by number, of folders as version 0.1 sorted them, and names that look like something else
NUMBERS = ClassNames([(str(i),) for i in range(10)])
AS_TEXT = ClassNames([(name,) for name in ("0", "1", "10", "2")])
ODD = ClassNames([("salt, pepper",), ("0-9",), ("name:x",), ("#1",), ("007",)])


@pytest.mark.parametrize(
    ("names", "text", "numbers"),
    [
        (NUMBERS, "3,1", [3, 1]),
        (NUMBERS, "name:3,#1,7-8", [3, 1, 7, 8]),
        (AS_TEXT, "0-1", [0, 1]),  # name and number are the same class
        (AS_TEXT, "10", [2]),  # there is no class number 10
        (AS_TEXT, "name:2, #2, #2-3", [3, 2, 2, 3]),
        (ODD, r"salt\, pepper,name:salt\, pepper", [0, 0]),
        (ODD, "name:0-9,#0-1", [1, 0, 1]),
        (ODD, "name:name:x,name:#1,name:007,#4", [2, 3, 4, 4]),
        (ClassNames(num_classes=12), "10-11", [10, 11]),
    ],
)
def test_a_label_means_the_same_on_the_command_line_and_in_python(names, text, numbers):
    assert names.numbers_of(text).tolist() == numbers
    parts = [part.replace("\\,", ",") for part in re.split(r"(?<!\\),", text)]
    assert names.numbers_of(parts).tolist() == numbers
    assert names.numbers_of(np.array(parts)).tolist() == numbers


@pytest.mark.parametrize(
    ("names", "text", "words"),
    [
        (AS_TEXT, "2", ["'2' is the name of class 3 and the number of class '10'", "name:2 ", "#2 "]),
        (AS_TEXT, "0-2", ["'0-2' has two meanings", "'2' is the name of class 3", "#0-2 for the number"]),
        (AS_TEXT, ["1", "02"], ["'02' has two meanings", "name:2 ", "#02 "]),
        (AS_TEXT, "4", ["labels must be class numbers from 0 to 3, got 4"]),
        (AS_TEXT, "#10", ["labels must be class numbers from 0 to 3, got 10"]),
        (AS_TEXT, "name:11", ["unknown class '11'"]),
        (ClassNames([("0-1",), ("b",)]), "0-1", ["'0-1' is the name of class 0 and a range", "name:0-1 ", "#0-1 "]),
        (ODD, "#1", ["'#1' is the name of class 3", "name:#1 "]),
        (ODD, "salt, pepper", ["'salt'", r"a comma inside a name is written \,"]),
        (NUMBERS, "5-3", ["a range must increase", "5-3"]),
        (NUMBERS, "0-400000000", ["from 0 to 9, got 400000000"]),
        (ClassNames(), "0-400000000", ["got 400000000"]),
        (NUMBERS, "3,", ["''"]),
        (NUMBERS, "#", ["'#'"]),
        (NUMBERS, "9" * 5000, ["'9999"]),
        (NUMBERS, [], ["a list of class numbers or class names, got []"]),
    ],
)
def test_a_label_with_two_meanings_or_none_is_refused(names, text, words):
    with pytest.raises(InputError) as refusal:
        names.numbers_of(text)
    assert refusal.value.field == "labels" and "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in words), refusal.value


def write_model(directory, num_classes, names=None):
    directory.mkdir(exist_ok=True)
    (directory / "model.json").write_text(json.dumps({"format": 1, "transformer": {"num_classes": num_classes}}))
    if names is not None:
        (directory / "classes.json").write_text(json.dumps(names))


def test_a_directory_has_its_own_names_or_those_of_imagenet(tmp_path):
    write_model(tmp_path / "own", 3, ["ant", "bee", "cat"])
    assert class_names_of(tmp_path / "own").find("Bee") == 1
    for name, own in (("converted", None), ("trained", [numbers for *_, numbers in imagenet_spellings()])):
        write_model(tmp_path / name, 1000, own)
        assert class_names_of(tmp_path / name).names == IMAGENET.names
    write_model(tmp_path / "other", 1000, [f"thing {i}" for i in range(1000)])
    assert class_names_of(tmp_path / "other").find("thing 7") == 7
    write_model(tmp_path / "small", 10)
    assert class_names_of(tmp_path / "small").names == ()
    with pytest.raises(InputError, match=r"^checkpoint .*none has no readable model\.json: "):
        class_names_of(tmp_path / "none")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[", "has no readable classes.json: "),
        ("[" * 100_000, "nested too deeply"),
        ('{"0": "ant"}', "classes.json must be a list"),
        ("[1, 2, 3]", "classes.json[0] must be text, got 1"),
        ('["ant", "bee"]', "must have a classes.json of 3 names, one for each class of model.json, got 2"),
    ],
)
def test_a_list_of_names_that_does_not_fit_is_refused(tmp_path, content, words):
    write_model(tmp_path, 3)
    (tmp_path / "classes.json").write_text(content)
    with pytest.raises(InputError) as refusal:
        class_names_of(tmp_path)
    assert words in str(refusal.value) and str(tmp_path) in str(refusal.value)


def test_unknown_name_without_a_near_one_lists_the_first_classes():
    with pytest.raises(
        InputError, match=r"got 'zzzz'; the first classes are 0 tench, 1 goldfish, .*, 4 \S.*, \.\.\.$"
    ):
        IMAGENET.numbers_of("zzzz")
    with pytest.raises(InputError, match=r"got 'x'; the classes are 0 ant, 1 bee$"):
        ClassNames([("ant",), ("bee",)]).numbers_of("x")
