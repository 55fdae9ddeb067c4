"""The recipe: what is accepted, how every error reads, and that a dump says all."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racnn_cli import recipe as recipes
from racnn_cli.errors import RacnnError
from racnn_cli.recipe import RECIPES, Recipe

MINIMAL = '[data]\npath = "birds"\n[model]\nweights = "none"\n'


def toml(folder: Path, text: str, name: str = "mine.toml") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


def error(*args: object, **keys: object) -> RacnnError:
    with pytest.raises(RacnnError) as caught:
        recipes.load(*args, **keys)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


# ---- shipped recipes


def test_the_recipes_that_the_readme_speaks_of_are_there() -> None:
    assert {"demo", "tiny"} <= set(recipes.names())
    assert recipes.names() == sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_complete(name) -> None:
    loaded = recipes.load(name)
    assert loaded.name == name
    assert len(loaded.about) > 20
    assert loaded.model.weights  # never left to a default that downloads or starts from noise unasked
    assert loaded.as_used() == loaded


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_has_a_quick_version(name) -> None:
    full, quick = recipes.load(name), recipes.load(name, ["quick=true"]).as_used()
    assert quick.data.limit == 12
    assert quick.alternate.rounds == 1
    for section in ("pretrain_cnn", "pretrain_apn", "fusion"):
        assert getattr(quick, section).epochs <= min(2, getattr(full, section).epochs)
    assert quick.model == full.model
    assert quick.as_used() == quick


def test_quick_never_makes_a_recipe_longer(tmp_path) -> None:
    text = "quick = true\n" + MINIMAL + "[pretrain_cnn]\nepochs = 1\n[alternate]\napn_epochs = 0\n"
    quick = recipes.load(toml(tmp_path, text), ["data.limit=5"]).as_used()
    assert (quick.pretrain_cnn.epochs, quick.alternate.apn_epochs, quick.data.limit) == (1, 0, 5)


# ---- round trip


@settings(max_examples=40, deadline=None)
@given(
    lr=st.floats(1e-9, 10.0),
    floor=st.floats(0.05, 0.45),
    k=st.one_of(st.floats(0.01, 100.0), st.just(math.inf)),
    about=st.text(st.characters(codec="utf-8"), max_size=40),
    path=st.text(st.characters(codec="utf-8", exclude_categories=("Cc",)), min_size=1, max_size=40),
    sizes=st.lists(st.integers(16, 4096), min_size=1, max_size=5),
    seed=st.integers(0, 2**31 - 1),
    flag=st.booleans(),
)
def test_load_of_dump_is_the_same_recipe(
    tmp_path_factory, lr, floor, k, about, path, sizes, seed, flag
) -> None:
    recipe = recipes.load("tiny").override(
        {
            "pretrain_cnn.lr": lr,
            "model.floor": floor,
            "model.k": k,
            "about": about,
            "data.path": path,
            "model.scales": len(sizes),
            "model.sizes": sizes,
            "seed": seed,
            "baseline": flag,
            "data.skip_bad": not flag,
        }
    )
    file = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    file.write_text(recipes.dump(recipe), encoding="utf-8")
    assert recipes.load(str(file)) == recipe


def test_a_dump_holds_every_key_in_the_schema(tmp_path) -> None:
    again = recipes.load(toml(tmp_path, recipes.dump(recipes.load("tiny"))))
    text = recipes.dump(again)
    for key in recipes.key_names():
        assert f"{key.rsplit('.', 1)[-1]} = " in text, key


def test_a_file_without_a_name_is_named_after_itself(tmp_path) -> None:
    assert recipes.load(toml(tmp_path, MINIMAL, "wagtails.toml")).name == "wagtails"
    assert recipes.load(toml(tmp_path, 'name = "other"\n' + MINIMAL)).name == "other"


def test_a_recipe_cannot_be_changed_in_place() -> None:
    with pytest.raises(ValueError, match="frozen"):
        recipes.load("tiny").seed = 4  # type: ignore[misc]


# ---- errors


def test_a_misspelt_recipe_names_the_nearest() -> None:
    wrong = error("demmo")
    assert "'demmo'" in wrong.message
    assert "did you mean demo" in wrong.message
    assert "tiny" in wrong.hint
    assert "did you mean" not in error("zzzzzz").message


def test_a_missing_file_and_a_path_to_one_are_told_apart_from_names(tmp_path) -> None:
    assert "no recipe file" in error(str(tmp_path / "none.toml")).message
    assert "there is no recipe" in error("../recipes/tiny").message


def test_not_toml_names_the_file_and_the_line(tmp_path) -> None:
    wrong = error(toml(tmp_path, "[model\nbackbone = 3"))
    assert "mine.toml" in wrong.message
    assert "line 1" in wrong.message


@pytest.mark.parametrize(
    ("set_", "near"),
    [
        ("train.bach=8", "train.batch"),
        ("batch=8", "train.batch"),
        ("model.backbon='vgg11'", "model.backbone"),
        ("lr=0.1", "pretrain_cnn.lr"),
        ("pretrain.epochs=1", "pretrain_cnn.epochs"),
    ],
)
def test_a_misspelt_set_key_names_the_nearest(set_, near) -> None:
    wrong = error("tiny", [set_])
    assert repr(set_.partition("=")[0]) in wrong.message
    assert "did you mean" in wrong.message
    assert near in wrong.message


def test_a_misspelt_key_in_the_file_names_the_nearest(tmp_path) -> None:
    wrong = error(toml(tmp_path, MINIMAL + "bakcbone = 'vgg11'\n[trian]\nbatch = 3\n"))
    assert "2 error(s)" in wrong.message
    assert "model.bakcbone: no such key; did you mean model.backbone" in wrong.message
    assert "trian: no such key" in wrong.message


def test_all_errors_are_said_at_once(tmp_path) -> None:
    text = (
        "[data]\npath = 3\nval = 1.5\n[model]\nweights = 'none'\nscales = 9\n[train]\nbatch = '8'\namp = 1\n"
    )
    wrong = error(toml(tmp_path, text))
    assert "5 error(s)" in wrong.message
    for part in ("data.path", "data.val", "model.scales", "train.batch", "train.amp"):
        assert part in wrong.message
    assert "(found 9)" in wrong.message
    assert "(found '8')" in wrong.message
    assert "less than or equal to 5" in wrong.message


@pytest.mark.parametrize(
    ("set_", "part"),
    [
        ("train.batch=0", "greater than or equal to 1"),
        ("train.optimizer='adam'", "'adamw' or 'sgd'"),
        ("data.workers=1.5", "data.workers"),
        ("train.amp='no'", "train.amp"),
        ("pretrain_cnn.lr=nan", "pretrain_cnn.lr"),
        ("model.sizes=64", "model.sizes"),
        ("model.sizes='64'", "model.sizes"),
        ("model.sizes=[64, 64, 8]", "model.sizes.2"),
        ("model.sizes=[64]", "1 entries for model.scales = 3"),
        ("model.floor=0.97", "model.ceiling = 0.95 must rise in this order"),
        ("model.side=0.2", "model.side = 0.2 and"),
        ("alternate.apn_gradient='es'", "alternate.apn_gradient: Input should be"),
        ("alternate.boxes=7", "alternate.boxes: Input should be a multiple of 2 (found 7)"),
        ("alternate.boxes=0", "alternate.boxes: Input should be greater than or equal to 2 (found 0)"),
        ("alternate.boxes=8.0", "alternate.boxes"),
        ("alternate.spread=0.0", "alternate.spread: Input should be greater than 0 (found 0.0)"),
        ("alternate.spread=1.5", "alternate.spread: Input should be less than or equal to 1 (found 1.5)"),
        ("alternate.spread=nan", "alternate.spread"),
        ("alternate.tighten=-0.1", "alternate.tighten: Input should be greater than or equal to 0"),
        ("alternate.tighten=2.5", "alternate.tighten: Input should be less than or equal to 2"),
        ("alternate.settle=1", "alternate.settle"),
        ("name='a/b'", "name"),
        ("data=3", "no recipe key 'data'"),
    ],
)
def test_a_wrong_value_is_said_with_what_was_found(set_, part) -> None:
    assert part in error("tiny", [set_]).message


@pytest.mark.parametrize("line", ["model = 'vgg11'", "model = 3", "data = []", "[[train]]\nbatch = 3"])
def test_a_value_where_a_table_belongs(tmp_path, line) -> None:
    wrong = error(toml(tmp_path, line + "\n"))
    assert line.split()[0].strip("[]") in wrong.message


def test_sizes_that_are_no_list_with_fewer_scales(tmp_path) -> None:
    wrong = error(toml(tmp_path, MINIMAL + "sizes = 64\n"), (), {"model.scales": 2})
    assert "model.sizes" in wrong.message


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["model.gradient='boxcar'", "model.k=inf"], "finite model.k"),
        (["model.gradient='none'"], "nothing to learn from"),
    ],
)
def test_a_crop_without_a_slope_cannot_teach_through_it(sets, words) -> None:
    through = [*sets, "alternate.apn_gradient='backprop'"]
    assert words in error("tiny", through).message
    for fixed in ([*through, "alternate.apn_epochs=0"], sets):  # boxes that are tried need no slope
        assert recipes.load("tiny", fixed).model.gradient == sets[0].split("'")[1]


def test_the_ends_of_what_perturbed_and_tighter_boxes_may_be(tmp_path) -> None:
    ends = (
        {"apn_gradient": "perturb", "boxes": 2, "spread": 1.0, "tighten": 2.0, "settle": True},
        {"apn_gradient": "backprop", "boxes": 1024, "spread": 0.001, "tighten": 0.0, "settle": False},
    )
    for number, end in enumerate(ends):
        lines = "".join(
            f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for key, v in end.items()
        )
        section = recipes.load(toml(tmp_path, f"{MINIMAL}[alternate]\n{lines}", f"{number}.toml")).alternate
        assert {key: getattr(section, key) for key in end} == end


def test_weights_are_asked_for_in_so_many_words(tmp_path) -> None:
    wrong = error(toml(tmp_path, '[data]\npath = "birds"\n[model]\nbackbone = "vgg11"\n'))
    assert "model.weights: missing" in wrong.message
    for word in ("none", "pretrained", "FILE"):
        assert word in wrong.hint


def test_a_missing_table_is_named(tmp_path) -> None:
    assert "model: missing" in error(toml(tmp_path, "seed = 1\n")).message


# ---- --set


def test_set_takes_toml_and_plain_words() -> None:
    sets = ["train.lr=1e-3", "data.path=my birds/a=b", " quick =true", "model.sizes=[64, 32]", "about='x'"]
    assert recipes.parse_sets(sets) == {
        "train.lr": 1e-3,
        "data.path": "my birds/a=b",
        "quick": True,
        "model.sizes": [64, 32],
        "about": "x",
    }


@pytest.mark.parametrize("text", ["train.batch", "=8", "  =8"])
def test_set_without_a_key_or_a_value(text) -> None:
    with pytest.raises(RacnnError, match="key=value"):
        recipes.parse_sets([text])


def test_changes_win_over_sets_and_sets_over_the_file() -> None:
    loaded = recipes.load("tiny", ["seed=5", "train.batch=3"], {"seed": 9})
    assert (loaded.seed, loaded.train.batch) == (9, 3)
    assert loaded.model.apn_hidden == recipes.load("tiny").model.apn_hidden


# ---- scales and sizes


@pytest.mark.parametrize(
    ("scales", "sizes"), [(1, (96,)), (2, (96, 64)), (3, (96, 64, 32)), (5, (96, 64, 32, 32, 32))]
)
def test_scales_adapt_the_sizes(tmp_path, scales, sizes) -> None:
    file = toml(tmp_path, MINIMAL + "scales = 3\nsizes = [96, 64, 32]\n")
    assert recipes.load(file, (), {"model.scales": scales}).model.sizes == sizes
    assert recipes.load(file, [f"model.scales={scales}"]).model.sizes == sizes


def test_sizes_given_with_scales_are_taken_at_their_word() -> None:
    loaded = recipes.load("tiny", ["model.scales=2", "model.sizes=[64, 48]"])
    assert loaded.model.sizes == (64, 48)
    assert "2 entries for model.scales = 3" in error("tiny", ["model.sizes=[64, 48]"]).message


def test_scales_out_of_range_are_an_error_and_not_a_crash() -> None:
    assert "model.scales" in error("tiny", (), {"model.scales": 0}).message
    assert "model.scales" in error("tiny", ["model.scales='three'"]).message


def test_override_checks_the_whole() -> None:
    base: Recipe = recipes.load("tiny")
    with pytest.raises(RacnnError, match=r"model\.floor"):
        base.override({"model.floor": 0.96})
    with pytest.raises(RacnnError, match="did you mean seed"):
        base.override({"sead": 1})
    assert base.override({"seed": 4}).seed == 4
