"""Grids: what is run, and what is refused before anything runs."""

import json

import pytest
from suite_grids import TINY, cells

from pysparse.suite.cells import Cell, RecipeSpec
from pysparse.suite.grid import load_grid, parse_grid


def test_cells_are_the_product_of_the_lists_less_what_rules_skip():
    rule = '[[skip]]\nrecipe = "wan*"\nsparsity = [0.7]\n'
    grid = parse_grid(
        TINY + cells(recipes='"magnitude", "wanda"', sparsities="0.5, 0.7", seeds="0, 1",
                     more='patterns = ["unstructured", "2:4"]') + rule
    )  # fmt: skip
    found = {(cell.recipe, cell.pattern, cell.sparsity, cell.seed) for cell in grid.cells}
    wanted = {
        (recipe, pattern, sparsity, seed)
        for recipe in ("magnitude", "wanda")
        for pattern, sparsity in (("unstructured", 0.5), ("unstructured", 0.7), ("2:4", 0.5))
        for seed in (0, 1)
        if (recipe, sparsity) != ("wanda", 0.7)
    }
    assert found == wanted
    assert len(grid.cells) == len(wanted)
    assert grid.skipped == 2


def test_a_cell_is_the_same_under_its_id_and_another_with_anything_changed():
    base = parse_grid(TINY + cells()).cells[0]
    assert Cell.from_dict(json.loads(json.dumps(base.to_dict()))) == base
    assert len(base.id) == 16
    others = [
        parse_grid(text).cells[0]
        for text in (
            TINY + cells(seeds="1"), TINY + cells(sparsities="0.6"), TINY + cells(recipes='"wanda"'),
            "threads = 2\n" + TINY + cells(), TINY.replace("windows = 2", "windows = 3") + cells(),
            TINY.replace('method = "magnitude"', 'method = "magnitude"\nallocation = "erk"') + cells(),
        )
    ]  # fmt: skip
    assert len({base.id, *(other.id for other in others)}) == 7
    assert base.id == parse_grid('name = "renamed"\n' + TINY + cells(seeds="1, 0")).cells[1].id


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('["demo"]', '["dmo"]', r"unknown model .*'dmo' \(did you mean 'demo'\?\)"),
        ('["demo"]', '["no/such/folder"]', "no such model folder: no/such/folder"),
        ('method = "magnitude"', 'method = "magnitud"', r"unknown method 'magnitud' \(did you mean 'magnitude'"),
        ('method = "magnitude"', 'methd = "magnitude"', r"'methd' \(did you mean 'method'"),
        ('method = "magnitude"', "method = 3", r"\[recipes.magnitude\] method is a int, expected a str"),
        ("num_samples = 4", 'allocation = "olw"', r"unknown allocation 'olw' \(did you mean 'owl'"),
        ("num_samples = 4", 'allocation = "owl:n=1"', "allocation 'owl' has no setting 'n=1'"),
        ("num_samples = 4", 'reconstruction = "blok"', r"'blok' \(did you mean 'block'"),
        ("num_samples = 4", 'reconstruction = "block:steps=-1"', "steps"),
        ("num_samples = 4", "num_samples = 0", "num_samples is a whole number of at least 1, got 0"),
        ("num_samples = 4", 'propagate = "denser"', "propagate is"),
        ('task = "language"', 'task = "langage"', r"unknown task 'langage' \(did you mean 'language'"),
        ("windows = 2", "windos = 2", r"'windos' \(did you mean 'windows'"),
        ("windows = 2", 'windows = "2"', "windows is a str, expected a int"),
        ("seeds", "seds", r"'seds' \(did you mean 'seeds'"),
        ("sparsities = [0.5]", "sparsities = [50]", "did you mean 0.5"),
        ("sparsities = [0.5]", "sparsities = []", "needs a list 'sparsities'"),
        ("sparsities = [0.5]", 'sparsities = [0.5]\npatterns = ["4:2"]', 'got "4:2"'),
        ('["magnitude", "wanda"]', '["magnitude", "wnda"]', r"'wnda' \(did you mean 'wanda'"),
        ("[[cells]]", '[[skip]]\nrecip = "x"\n[[cells]]', r"'recip' \(did you mean 'recipe'"),
        ("[[cells]]", "[[skip]]\n[[cells]]", "would take out every cell"),
        ("[[cells]]", '[[skip]]\ntask = "*"\n[[cells]]', "no cell is left"),
        ("[[cells]]", "[[cels]]", r"'cels' \(did you mean 'cells'"),
        ("[[cells]]", "[[cells", "at line"),
    ],
)  # fmt: skip
def test_bad_grids_are_refused_with_the_nearest_name(tmp_path, before, after, message):
    text = TINY + cells(recipes='"magnitude", "wanda"')
    assert before in text
    path = tmp_path / "grid.toml"
    path.write_text(text.replace(before, after))
    with pytest.raises(ValueError, match=message) as error:
        load_grid(path)
    assert str(error.value).startswith(str(path))


def test_a_structural_method_has_no_zeros_to_tune_and_skip_rules_come_first():
    text = TINY + '[recipes.small]\nmethod = "2ssp"\n'
    block = cells(recipes='"small", "wanda"', sparsities="0.25", more='patterns = ["unstructured", "2:4"]')
    with pytest.raises(ValueError, match=r"recipes.small.*2:4.*writes no zeros"):
        parse_grid(text + block)
    skip = '[[skip]]\nrecipe = "small"\npattern = "2:4"\n'
    assert len(parse_grid(text + block + skip).cells) == 3
    tuned = text + 'reconstruction = "block"\n' + cells(recipes='"small"')
    with pytest.raises(ValueError, match="no zeros to place or tune"):
        parse_grid(tuned)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no such grid file"):
        load_grid(tmp_path / "none.toml")


def test_plans_name_what_the_method_does_itself():
    from pysparse.suite.recipes import plan_of

    def named(**spec):
        plan = plan_of(RecipeSpec(**spec), "unstructured", 0.5)
        return plan.allocation, plan.reconstruction

    assert named() == ("uniform", None)
    assert named(method="sparsegpt", allocation="owl") == ("owl", "obs")
    assert named(method="pot") == ("l2norm", "correct")
    assert named(method="magnitude", allocation="fcpts", reconstruction="op:steps=2") == (
        "fcpts",
        "op:steps=2",
    )
