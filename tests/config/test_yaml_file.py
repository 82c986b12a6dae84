"""The text of recipes: YAML, `extends`, and files that are no recipes, whatever is in them."""

from pathlib import Path

import pytest

from megatron_sbn.config import load_recipe
from megatron_sbn.errors import RecipeError

RECIPE = """
name: minimal
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 4, seq_length: 32, vocab_size: 100}
data: {train: some/shard}
training: {steps: 10, global_batch_size: 8, micro_batch_size: 4}
"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def refusal(path: Path, *overrides: str) -> str:
    """The message of the RecipeError, which must be one line."""
    with pytest.raises(RecipeError) as error:
        load_recipe(path, overrides)
    assert "\n" not in str(error.value)
    assert error.value.status == 2
    return str(error.value)


def test_extends_merges_sections_relative_to_the_file(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", RECIPE)
    write(tmp_path / "sizes" / "wide.yaml", "extends: ../base.yaml\nmodel: {hidden_size: 128}\nname: wide\n")
    path = write(
        tmp_path / "sizes" / "last.yaml", "extends: wide.yaml\nlinear: {sparsity: 4:8}\ndata: {train: [x, y]}\n"
    )
    recipe = load_recipe(path, ["model.num_layers=4"])
    assert recipe.name == "wide"
    assert (recipe.model.hidden_size, recipe.model.ffn_hidden_size, recipe.model.num_layers) == (128, 128, 4)
    assert recipe.linear.sparsity == (4, 8)
    assert [shard.path for shard in recipe.data.train] == ["x", "y"]  # lists are replaced


def test_extends_of_itself_names_the_way_round(tmp_path: Path) -> None:
    write(tmp_path / "a.yaml", "extends: b.yaml")
    write(tmp_path / "b.yaml", "extends: sub/../a.yaml")
    message = refusal(tmp_path / "a.yaml")
    assert "a.yaml: extends itself, by way of a.yaml -> b.yaml -> a.yaml" in message


# A few lines that stand for 2^30 values.
BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 30))
MERGE_BOMB = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("extends: missing.yaml", "missing.yaml: cannot read this recipe"),
        ("extends: [a, b]", r"extends: \['a', 'b'\] is not the path of a recipe"),
        ("extends: 7", "extends: 7 is not the path of a recipe"),
        ("extends: .", "cannot read this recipe: .*Is a directory"),
        ("- a\n- b", "a recipe is a mapping of sections"),
        ("just text", "a recipe is a mapping of sections"),
        ("", "a recipe is a mapping of sections"),
        ("1: 2", "a recipe is a mapping of sections"),
        ("model: {a: 1, a: 2}", "key 'a' is given twice"),
        ("model: {hidden_size: 1}\nmodel: {hidden_size: 2}", "key 'model' is given twice"),
        ("a: !!python/object/apply:os.system [true]", "could not determine a constructor for the tag"),
        ("a: !!python/name:os.system", "could not determine a constructor"),
        ("a: [", "not valid YAML"),
        ("a: b: c", "not valid YAML"),
        ("a: \t- x", "not valid YAML"),
        ("name: &x [*x]", "not valid YAML, line 1, column 7: a value that holds itself"),
        ("? [a]\n: 1", "not valid YAML|mapping of sections"),
        ("a: " + "[" * 1500, "not valid YAML"),
        ("a: " + "{a: " * 3000, "not valid YAML"),
        ("model: 2026-99-99\nname: a\ndata: {train: x}", "model = '2026-99-99': "),
        ("a: !!timestamp x", "could not determine a constructor"),
        ("a: !!binary aGk=", "could not determine a constructor"),
        ("a: {[1]: 2}", "not valid YAML, line 1, column 5: a list or mapping as key"),
        ("a: " + "[" * 70 + "]" * 70, "not valid YAML: more than 64 levels of nesting"),
        ("a: " + "[" * 20_000, "not valid YAML: more than 64 levels of nesting"),
        (BOMB, "not valid YAML: it stands for more than 100,000 values"),
        (MERGE_BOMB, "not valid YAML: it stands for more than 100,000 values"),
        ("#" * 5_000_000, "more than 4,194,304 bytes; this is no recipe"),
        ("extends: /dev/zero", "/dev/zero: is no file; name one to read a recipe from"),
        ("extends: loop.yaml", "loop.yaml: cannot read this recipe: Too many levels of symbolic links"),
        ('extends: "a\\0"', "cannot read this recipe: embedded null byte"),
        ("model: {uri: http://someone:hush@host", r"line 1, column 38: "),
        ("name: \x00", "not valid YAML"),
    ],
    ids=lambda text: text[:40].replace("\x00", "NUL"),
)
def test_files_that_are_no_recipe(text: str, expected: str, tmp_path: Path) -> None:
    path = write(tmp_path / "recipe.yaml", text)
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(RecipeError, match=expected) as error:
        load_recipe(path)
    assert "hush" not in str(error.value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("depth", [50, 200, 300, 500, 900])
def test_deep_nesting_is_refused_at_any_depth(depth: int, base: Path) -> None:
    assert "name = " in refusal(base, "name=" + "[" * 50 + "]" * 50)
    refusal(base, "name=" + "[" * depth + "]" * depth)
    refusal(base, "linear.phases=" + "[{a: " * depth + "1" + "}]" * depth)


def test_a_section_that_holds_itself_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "base.yaml", RECIPE + "linear: &m {x: *m}\n")
    path = write(tmp_path / "last.yaml", "extends: base.yaml\nlinear: &m {x: *m}\n")
    assert "a value that holds itself" in refusal(path)


def test_a_chain_of_parents_has_an_end(tmp_path: Path) -> None:
    for number in range(40):
        write(tmp_path / f"{number}.yaml", f"extends: {number + 1}.yaml\n")
    write(tmp_path / "40.yaml", RECIPE)
    assert load_recipe(tmp_path / "8.yaml").name == "minimal"
    assert "the last of more than 32 recipes that extend each other" in refusal(tmp_path / "7.yaml")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert "absent.yaml: cannot read this recipe" in refusal(tmp_path / "absent.yaml")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x81")
    assert "binary.yaml: cannot read this recipe" in refusal(tmp_path / "binary.yaml")
