"""The weights of every point are those of the formula, whatever was set before, and the file's own again at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import TARGETS, make_adapter, merge
from safetensors.torch import save_file
from tiny_models import make_pair, read_tensors
from transformers import AutoModelForCausalLM

from lox_merge.maths.landscape import gaussian_noise
from lox_merge.safety.landscape.directions import Axis, Direction, Slice, model_slices, random_slices
from lox_merge.safety.landscape.mover import WeightMover
from lox_merge.safety.landscape.sources import Sources

AXIS = Axis(-0.5, 1.5, 4)
ARCHITECTURES = ["llama", "qwen3", "gpt2", "mixtral", "gpt_oss"]


def mover_of(base: Path, others: dict[str, Path], dtype: torch.dtype = torch.float32, **selection: Any) -> WeightMover:
    sources = Sources(base, others)
    chosen = sources.randomly_moved(selection.get("include", ()), selection.get("exclude", ()))
    return WeightMover(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), sources, chosen)


def weights(mover: WeightMover) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in mover.model.state_dict().items()}


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype and torch.equal(value, other[name]), name


def loaded(folder: Path, source: Path, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What transformers makes of these tensors: names and fusions are not ours to get right."""
    folder.mkdir()
    save_file({name: value.float().contiguous() for name, value in tensors.items()}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    return state


def excluded(name: str, values: torch.Tensor) -> bool:
    return values.ndim < 2 or "norm" in name or "ln_" in name or name.endswith("bias")


def noise(name: str, values: torch.Tensor, seed: int, norm: float) -> torch.Tensor:
    drawn = gaussian_noise(values.shape, name, seed).double()
    return drawn * (norm / float(drawn.norm()))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_random_point_is_the_formula_in_float64(tmp_path: Path, architecture: str) -> None:
    base, _ = make_pair(tmp_path / "pair", architecture)
    (plane,) = random_slices(1, AXIS, AXIS, seed=3)
    stored = read_tensors(base)
    exact = {
        name: values.double()
        if excluded(name, values)
        else values.double()
        + 0.3 * noise(name, values, 3, float(values.double().norm()))
        - 0.2 * noise(name, values, 4, float(values.double().norm()))
        for name, values in stored.items()
    }
    mover = mover_of(base, {})
    before = weights(mover)
    mover.prepare(plane)
    mover.move(plane, (0.3, -0.2))
    expected = loaded(tmp_path / "reference", base, exact)
    changed = weights(mover)
    assert changed.keys() == expected.keys()
    for name, value in changed.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=2e-6 * float(expected[name].abs().max() + 1), msg=name)
    assert any(not torch.equal(value, before[name]) for name, value in changed.items())
    mover.restore()
    assert_same(weights(mover), before)


@pytest.mark.parametrize("architecture", ["llama", "mixtral", "gpt_oss"])
def test_a_point_of_the_plane_is_the_formula_in_float64(tmp_path: Path, architecture: str) -> None:
    base, aligned = make_pair(tmp_path / "pair", architecture)
    third = make_pair(tmp_path / "other", architecture, seed=1)[1]
    fourth = make_pair(tmp_path / "fourth", architecture, seed=2)[1]
    (plane,) = model_slices(["two", "three", "four"], AXIS, AXIS, controls=0, seed=0)
    one, two, three, four = (read_tensors(folder) for folder in (base, aligned, third, fourth))
    a, b = 1.3, -0.4
    exact = {
        name: values.double() + a * (two[name].double() - values.double()) + b * ((three[name].double() + four[name].double()) / 2 - values.double())
        for name, values in one.items()
    }
    mover = mover_of(base, {"two": aligned, "three": third, "four": fourth})
    mover.prepare(plane)
    mover.move(plane, (a, b))
    for name, value in loaded(tmp_path / "reference", base, exact).items():
        torch.testing.assert_close(weights(mover)[name], value, rtol=0, atol=2e-6 * float(value.abs().max() + 1), msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models_on_a_line_have_their_own_bits_and_come_back(tmp_path: Path, architecture: str, dtype: torch.dtype) -> None:
    base, aligned = make_pair(tmp_path, architecture)
    (line,) = model_slices(["aligned"], AXIS, None, controls=0, seed=0)
    before = {name: value.clone() for name, value in AutoModelForCausalLM.from_pretrained(base, dtype=dtype).state_dict().items()}
    target = AutoModelForCausalLM.from_pretrained(aligned, dtype=dtype).state_dict()
    with pytest.raises(KeyboardInterrupt), mover_of(base, {"aligned": aligned}, dtype) as mover:
        mover.prepare(line)
        mover.move(line, (1.0,))
        assert_same(weights(mover), target)
        mover.move(line, (0.0,))
        assert_same(weights(mover), before)
        mover.move(line, (1.5,))
        assert any(not torch.equal(value, before[name]) for name, value in weights(mover).items())
        raise KeyboardInterrupt
    assert_same(weights(mover), before)


def test_the_order_of_points_does_not_matter_nor_what_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, aligned = make_pair(tmp_path, "mixtral")
    line, control = model_slices(["aligned"], AXIS, None, controls=1, seed=7)
    mover = mover_of(base, {"aligned": aligned}, torch.bfloat16)
    mover.prepare(control)
    mover.move(control, (0.7,))
    direct = weights(mover)
    mover.prepare(line)
    mover.move(line, (1.5,))
    monkeypatch.setattr("lox_merge.safety.landscape.mover._SHARE_OF_FREE_MEMORY", 0.0)
    mover.prepare(control)
    assert not mover.kept
    mover.move(control, (-0.5,))
    mover.move(control, (0.7,))
    assert_same(weights(mover), direct)


def test_a_control_has_the_norm_of_the_difference_in_every_tensor(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path, "llama", dtype="float32")
    control = model_slices(["aligned"], AXIS, None, controls=1, seed=7)[1]
    mover = mover_of(base, {"aligned": aligned})
    mover.prepare(control)
    mover.move(control, (1.0,))
    first, second = read_tensors(base), read_tensors(aligned)
    for name, value in weights(mover).items():
        moved, wanted = (value - first[name]).norm(), (second[name] - first[name]).norm()
        torch.testing.assert_close(moved, wanted, rtol=2e-5, atol=1e-6, msg=name)


def test_tied_weights_move_once_and_stay_tied(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "qwen3")
    mover = mover_of(base, {})
    (line,) = random_slices(1, AXIS, None, seed=0)
    mover.prepare(line)
    mover.move(line, (0.5,))
    embedding = mover.model.model.embed_tokens.weight
    assert mover.model.lm_head.weight.data_ptr() == embedding.data_ptr()
    stored = read_tensors(base)["model.embed_tokens.weight"]
    exact = stored.double() + 0.5 * noise("model.embed_tokens.weight", stored, 0, float(stored.double().norm()))
    torch.testing.assert_close(embedding.double(), exact, rtol=0, atol=1e-6)


def test_selection_decides_what_random_directions_move(tmp_path: Path) -> None:
    base, _ = make_pair(tmp_path, "llama", attention_bias=True)
    mover = mover_of(base, {}, include=["mlp", "norm"], exclude=["layers.1"])
    before = weights(mover)
    (line,) = random_slices(1, AXIS, None, seed=0)
    mover.prepare(line)
    mover.move(line, (0.5,))
    moved = {name for name, value in weights(mover).items() if not torch.equal(value, before[name])}
    assert moved == {name for name in before if ("mlp" in name or "norm" in name) and "layers.1" not in name}
    default = mover_of(base, {})
    default.prepare(line)
    default.move(line, (0.5,))
    moved = {name for name, value in weights(default).items() if not torch.equal(value, before[name])}
    assert moved == {name for name, value in before.items() if value.ndim == 2}


def test_noise_is_standard_normal_and_each_tensor_and_seed_has_its_own() -> None:
    one = gaussian_noise((600, 500), "a", 0).double()
    assert abs(float(one.mean())) < 0.01 and abs(float(one.std()) - 1) < 0.01 and abs(float((one**4).mean()) - 3) < 0.1
    assert torch.equal(one, gaussian_noise((600, 500), "a", 0).double())
    for other in (gaussian_noise((600, 500), "b", 0), gaussian_noise((600, 500), "a", 1)):
        assert abs(float((one * other.double()).mean())) < 0.01
    assert float((one[:300] * one[300:]).mean()) < 0.01


def test_models_are_placed_in_the_plane_by_least_squares(tmp_path: Path) -> None:
    base, aligned = make_pair(tmp_path / "pair", "llama", dtype="float32")
    third = make_pair(tmp_path / "third", "llama", dtype="float32", seed=1)[1]
    sources = Sources(base, {"two": aligned, "three": third})
    flat = [torch.cat([values.double().flatten() for _, values in sorted(read_tensors(folder).items())]) for folder in (base, aligned, third)]
    first, other = flat[1] - flat[0], flat[2] - flat[0]
    (place,) = sources.places([Direction("towards two", {"two": 1.0})], ["three"])
    coordinate = float(first @ other / (first @ first))
    distance = float((other - coordinate * first).norm())
    assert place.coordinates == pytest.approx((coordinate,), rel=1e-9)
    assert place.distance == pytest.approx(distance, rel=1e-9) and place.off_plane == pytest.approx(distance / float(other.norm()), rel=1e-9)
    two, three = sources.places([Direction("a", {"two": 1.0}), Direction("b", {"three": 1.0})], ["two", "three"])
    assert two.coordinates == pytest.approx((1, 0), abs=1e-9) and three.coordinates == pytest.approx((0, 1), abs=1e-9)
    assert three.off_plane == pytest.approx(0, abs=1e-6)
    assert two.coordinates[1] == 0 and three.coordinates[0] == 0  # and not what rounding leaves of it


@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
def test_the_other_model_may_be_an_adapter(tmp_path: Path, architecture: str) -> None:
    base, _ = make_pair(tmp_path, architecture)
    adapter = make_adapter(base, tmp_path / "adapter", **TARGETS[architecture])
    mover = mover_of(base, {"adapter": adapter})
    (line,) = model_slices(["adapter"], AXIS, None, controls=0, seed=0)
    mover.prepare(line)
    mover.move(line, (1.0,))
    expected = merge(base, adapter)
    for name, value in weights(mover).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-5, msg=name)


def test_axes_meet_zero_and_one() -> None:
    assert Axis(-0.5, 0.5, 20).coordinates[10] == 0.0 and Axis(-0.5, 1.5, 20).coordinates[15] == 1.0
    assert len(Axis(-0.5, 0.5, 20).coordinates) == 21
    assert len(Slice("s", (Direction("x"), Direction("y")), ((0.0, 1.0), (0.0, 0.5, 1.0))).places) == 6
