import json
import tracemalloc

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
    (tmp_path / "own" / "classes.json").write_text("[")
    with pytest.raises(InputError, match=r"^checkpoint .* has no readable classes\.json: "):
        class_names_of(tmp_path / "own")
