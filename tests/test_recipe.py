"""Recipes: accepted values, error messages, complete dumps."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racnn_cli import recipe as recipes
from racnn_cli.errors import RecipeError
from racnn_cli.recipe import RECIPES, Recipe

MINIMAL = '[data]\npath = "birds"\n[model]\nweights = "none"\n'


def toml(folder: Path, text: str, name: str = "mine.toml") -> str:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return str(file)


def error(*args: object, **keys: object) -> RecipeError:
    with pytest.raises(RecipeError) as caught:
        recipes.load(*args, **keys)  # type: ignore[arg-type]
    assert caught.value.exit_code == 2
    assert caught.value.hint
    return caught.value


# ---- shipped recipes


def test_the_recipes_of_the_readme_exist() -> None:
    assert {"demo", "tiny"} <= set(recipes.names())
    assert recipes.names() == sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_is_complete(name) -> None:
    loaded = recipes.load(name)
    assert loaded.name == name
    assert len(loaded.about) > 20
    assert loaded.model.weights  # no default that downloads or starts from random weights unasked
    assert loaded.as_used() == loaded


@pytest.mark.parametrize("name", recipes.names())
def test_a_shipped_recipe_has_a_quick_version(name) -> None:
    full, quick = recipes.load(name), recipes.load(name, ["quick=true"]).as_used()
    assert quick.data.images == 48
    assert quick.alternate.rounds == 2
    for section in ("pretrain_cnn", "pretrain_apn", "fusion"):
        assert getattr(quick, section).epochs <= min(2, getattr(full, section).epochs)
    assert quick.model == full.model
    assert quick.as_used() == quick


def test_quick_never_makes_a_recipe_longer(tmp_path) -> None:
    text = "quick = true\n" + MINIMAL + "[pretrain_cnn]\nepochs = 1\n[alternate]\napn_epochs = 0\n"
    quick = recipes.load(toml(tmp_path, text), ["data.images=5"]).as_used()
    assert (quick.pretrain_cnn.epochs, quick.alternate.apn_epochs, quick.data.images) == (1, 0, 5)


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
def test_load_of_dump_is_the_same_recipe(tmp_path_factory, lr, floor, k, about, path, sizes, seed, flag) -> None:
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


def test_a_dump_contains_every_key(tmp_path) -> None:
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
    caught = error("demmo")
    assert "'demmo'" in caught.message
    assert "did you mean demo" in caught.message
    assert "tiny" in caught.hint
    assert "did you mean" not in error("zzzzzz").message


def test_missing_files_and_unknown_names_differ(tmp_path) -> None:
    assert "recipe not found" in error(str(tmp_path / "none.toml")).message
    assert "unknown recipe" in error("../recipes/tiny").message


def test_not_toml_names_the_file_and_the_line(tmp_path) -> None:
    caught = error(toml(tmp_path, "[model\nbackbone = 3"))
    assert "mine.toml" in caught.message
    assert "line 1" in caught.message


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
    caught = error("tiny", [set_])
    assert repr(set_.partition("=")[0]) in caught.message
    assert "did you mean" in caught.message
    assert near in caught.message


def test_a_misspelt_key_in_the_file_names_the_nearest(tmp_path) -> None:
    caught = error(toml(tmp_path, MINIMAL + "bakcbone = 'vgg11'\n[trian]\nbatch = 3\n"))
    assert "2 error(s)" in caught.message
    assert "model.bakcbone: unknown key; did you mean model.backbone" in caught.message
    assert "trian: unknown key" in caught.message


def test_all_errors_are_listed_at_once(tmp_path) -> None:
    text = "[data]\npath = 3\nval = 1.5\n[model]\nweights = 'none'\nscales = 9\n[train]\nbatch = '8'\namp = 1\n"
    caught = error(toml(tmp_path, text))
    assert "5 error(s)" in caught.message
    for part in ("data.path", "data.val", "model.scales", "train.batch", "train.amp"):
        assert part in caught.message
    assert "(found 9)" in caught.message
    assert "(found '8')" in caught.message
    assert "less than or equal to 5" in caught.message


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
        ("data=3", "unknown recipe key 'data'"),
    ],
)
def test_an_invalid_value_is_named(set_, part) -> None:
    assert part in error("tiny", [set_]).message


@pytest.mark.parametrize("line", ["model = 'vgg11'", "model = 3", "data = []", "[[train]]\nbatch = 3"])
def test_a_value_instead_of_a_table(tmp_path, line) -> None:
    caught = error(toml(tmp_path, line + "\n"))
    assert line.split()[0].strip("[]") in caught.message


def test_sizes_that_are_not_a_list_with_fewer_scales(tmp_path) -> None:
    caught = error(toml(tmp_path, MINIMAL + "sizes = 64\n"), (), {"model.scales": 2})
    assert "model.sizes" in caught.message


@pytest.mark.parametrize(
    ("sets", "text"),
    [
        (["model.gradient='boxcar'", "model.k=inf"], "finite model.k"),
        (["model.gradient='none'"], "no gradient to learn from"),
    ],
)
def test_backprop_needs_a_gradient_through_the_crop(sets, text) -> None:
    through = [*sets, "alternate.apn_gradient='backprop'"]
    assert text in error("tiny", through).message
    for fixed in ([*through, "alternate.apn_epochs=0"], sets):  # perturbed boxes need no gradient through the crop
        assert recipes.load("tiny", fixed).model.gradient == sets[0].split("'")[1]


def test_bounds_of_the_options_for_perturbed_boxes(tmp_path) -> None:
    bounds = (
        {"apn_gradient": "perturb", "boxes": 2, "spread": 1.0, "tighten": 2.0, "settle": True},
        {"apn_gradient": "backprop", "boxes": 1024, "spread": 0.001, "tighten": 0.0, "settle": False},
    )
    for number, values in enumerate(bounds):
        lines = "".join(f"{key} = {str(v).lower() if isinstance(v, bool) else repr(v)}\n" for key, v in values.items())
        section = recipes.load(toml(tmp_path, f"{MINIMAL}[alternate]\n{lines}", f"{number}.toml")).alternate
        assert {key: getattr(section, key) for key in values} == values


def test_missing_weights_name_every_way_to_get_them(tmp_path) -> None:
    caught = error(toml(tmp_path, '[data]\npath = "birds"\n[model]\nbackbone = "vgg11"\n'))
    assert "model.weights: missing" in caught.message
    for word in ("none", "pretrained", "FILE", "package:", "`own`"):
        assert word in caught.hint


def test_a_missing_table_is_named(tmp_path) -> None:
    assert "model: missing" in error(toml(tmp_path, "seed = 1\n")).message


# ---- without a recipe


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("my-images", "my-images"),
        ("/data/My Birds!/", "My-Birds"),
        ("labels.csv", "labels"),
        ("plankton", "plankton"),
        ("…", "run"),
        ("", "run"),
    ],
)
def test_the_default_recipe_is_named_after_the_data(path, name) -> None:
    loaded = recipes.load(None, (), {"data.path": path, "model.weights": "none"})
    assert loaded == Recipe.model_validate({"name": name, "data": {"path": path}, "model": {"weights": "none"}})
    assert (loaded.model.backbone, loaded.model.scales, loaded.model.sizes) == ("vgg19", 3, ())


def test_the_default_recipe_has_no_weights() -> None:
    caught = error(None, (), {"data.path": "birds"})
    assert "the default recipe has 1 error(s)" in caught.message
    assert "--pretrained" in caught.hint


# ---- keys


def test_every_key_has_a_description_and_allowed_values() -> None:
    infos = recipes.describe_keys()
    assert [info.key for info in infos] == recipes.key_names()
    assert all(len(info.description) > 8 and info.allowed for info in infos)
    assert [info.key for info in infos if not info.default] == ["model.weights"]


def test_descriptions_of_keys() -> None:
    by_key = {info.key: info for info in recipes.describe_keys()}
    assert by_key["model.scales"][1:3] == ("3", "integer, >= 1, <= 5")
    assert by_key["data.fit"][1:3] == ('"crop"', "crop, pad, squash")
    assert by_key["train.amp"][1:3] == ("true", "true, false")
    assert by_key["model.sizes"][1:3] == ("[]", "list of integers")
    assert by_key["seed"].allowed == "integer, >= 0, < 2147483648"


def test_keys_by_pattern() -> None:
    assert [info.key for info in recipes.describe_keys("fusion.*")] == ["fusion.epochs", "fusion.lr"]
    assert {info.key for info in recipes.describe_keys("head")} == {"pretrain_cnn.head_lr"}
    assert recipes.describe_keys("nothing") == []


# ---- --set


def test_set_takes_toml_and_plain_text() -> None:
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
    with pytest.raises(RecipeError, match="key=value"):
        recipes.parse_sets([text])


def test_changes_override_sets_and_sets_override_the_file() -> None:
    loaded = recipes.load("tiny", ["seed=5", "train.batch=3"], {"seed": 9})
    assert (loaded.seed, loaded.train.batch) == (9, 3)
    assert loaded.model.apn_hidden == recipes.load("tiny").model.apn_hidden


# ---- scales and sizes


@pytest.mark.parametrize(("scales", "sizes"), [(1, (96,)), (2, (96, 64)), (3, (96, 64, 32)), (5, (96, 64, 32, 32, 32))])
def test_scales_adapt_the_sizes(tmp_path, scales, sizes) -> None:
    file = toml(tmp_path, MINIMAL + "scales = 3\nsizes = [96, 64, 32]\n")
    assert recipes.load(file, (), {"model.scales": scales}).model.sizes == sizes
    assert recipes.load(file, [f"model.scales={scales}"]).model.sizes == sizes


def test_sizes_given_with_scales_are_kept() -> None:
    loaded = recipes.load("tiny", ["model.scales=2", "model.sizes=[64, 48]"])
    assert loaded.model.sizes == (64, 48)
    assert "2 entries for model.scales = 3" in error("tiny", ["model.sizes=[64, 48]"]).message


def test_scales_out_of_range() -> None:
    assert "model.scales" in error("tiny", (), {"model.scales": 0}).message
    assert "model.scales" in error("tiny", ["model.scales='three'"]).message


def test_override_validates_the_whole_recipe() -> None:
    base: Recipe = recipes.load("tiny")
    with pytest.raises(RecipeError, match=r"model\.floor"):
        base.override({"model.floor": 0.96})
    with pytest.raises(RecipeError, match="did you mean seed"):
        base.override({"sead": 1})
    assert base.override({"seed": 4}).seed == 4
