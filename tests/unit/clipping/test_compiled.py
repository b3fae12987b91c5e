"""The compiled step equals the eager one, is traced once, and leaves to eager what a graph cannot decide."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from dp_flash_attention.clipping import ClippedGradientAccumulator, compiled
from dp_flash_attention.clipping.compiled import CompiledClipping
from dp_flash_attention.clipping.precision import full_precision
from dp_flash_attention.core.errors import CompilationError, InvalidInputError, MissingRuleError
from dp_flash_attention.training.losses import language_model_loss
from dp_flash_attention.training.models import TextTransformer, TextTransformerConfig

C = 0.5


def text_model(**changes):
    torch.manual_seed(0)
    sizes = {"vocab_size": 60, "seq_len": 12, "d_model": 16, "num_heads": 2, "num_layers": 1}
    return TextTransformer(TextTransformerConfig(**sizes, **changes))


def lm_loss(model, ids):
    return language_model_loss(model(ids), ids)


def both(model, clipping="flat"):
    ours = ClippedGradientAccumulator(model, l2_clip_norm=C, clipping=clipping)
    eager = ClippedGradientAccumulator(model, l2_clip_norm=C, clipping=clipping)
    return CompiledClipping(ours, model), ours, eager


def assert_same(ours, eager, found, expected):
    torch.testing.assert_close(found.norms, expected.norms, rtol=1e-4, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found.losses, expected.losses, rtol=1e-4, atol=1e-6, equal_nan=True)
    for name, total in eager.sums.items():
        torch.testing.assert_close(ours.sums[name], total, rtol=1e-4, atol=1e-6)


@pytest.fixture
def no_compiler(monkeypatch):
    """Runs the traced graph as it is: what is tested is the trace, and inductor takes seconds."""
    monkeypatch.setattr(torch, "compile", lambda graph, **_: graph)


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
def test_inductor_s_graph_equals_the_eager_step_over_several_steps(clipping):
    model = text_model(tie_head=True)
    step, ours, eager = both(model, clipping)
    for k in range(3):
        ids, weights = torch.randint(0, 60, (4, 12)), torch.tensor([1.0, 1.0, 1.0, 0.0])
        found = step.add(lm_loss, ids, batch_size=4, weights=weights)
        expected = eager.add(lambda ids=ids: lm_loss(model, ids), batch_size=4, weights=weights)
        assert_same(ours, eager, found, expected)
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        if k == 0:
            first_graphs = graphs
        assert graphs == first_graphs, "compiled again"
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.01)
    assert step.num_traces == 1


class Dropping(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, x):
        return self.second(F.dropout(self.norm(self.first(x)), 0.5, self.training)).squeeze(-1)


def squares(model, rows):
    return (model(rows[0]) - rows[1]).square()


def rows_of(num):
    return torch.randn(num, 6), torch.randn(num)


def test_inductor_draws_the_dropout_masks_of_the_eager_step():
    model = Dropping()
    step, ours, eager = both(model)
    for seed in range(3):
        rows = rows_of(5)
        torch.manual_seed(seed)
        found = step.add(squares, rows, batch_size=5)
        torch.manual_seed(seed)
        expected = eager.add(lambda rows=rows: squares(model, rows), batch_size=5)
        assert_same(ours, eager, found, expected)


@pytest.mark.parametrize("changes", [{}, {"tie_head": True}])
@pytest.mark.usefixtures("no_compiler")
def test_the_trace_equals_the_eager_step(changes):
    model = text_model(**changes).double()
    step, ours, eager = both(model)
    for _ in range(2):
        ids = torch.randint(0, 60, (3, 12))
        found = step.add(lm_loss, ids, batch_size=3)
        expected = eager.add(lambda ids=ids: lm_loss(model, ids), batch_size=3)
        assert_same(ours, eager, found, expected)


class Picture(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches, self.norm, self.head = nn.Conv2d(1, 4, 2, stride=2), nn.RMSNorm(4), nn.Linear(4, 1)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return self.head(self.norm(self.patches(x).flatten(2).mT).mean(1)).squeeze(-1) * self.scale


@pytest.mark.usefixtures("no_compiler")
def test_buffers_and_convolutions_are_read_at_each_call():
    model = Picture()
    step, ours, eager = both(model)

    def loss(model, x):
        return model(x).square()

    for scale in (1.0, 3.0):
        model.scale.fill_(scale)
        x = torch.randn(3, 1, 6, 6)
        found = step.add(loss, x, batch_size=3)
        expected = eager.add(lambda x=x: loss(model, x), batch_size=3)
        assert_same(ours, eager, found, expected)
    assert step.num_traces == 1


@pytest.mark.parametrize("clipping", ["flat", "per_layer"])
@pytest.mark.usefixtures("no_compiler")
def test_an_example_that_is_not_finite_is_dropped_as_in_the_eager_step(clipping):
    model = Dropping()
    step, ours, eager = both(model, clipping)
    x, y = rows_of(4)
    y[2] = float("nan")
    for seed in range(2):
        torch.manual_seed(seed)
        found = step.add(squares, (x, y), batch_size=4)
        torch.manual_seed(seed)
        expected = eager.add(lambda: squares(model, (x, y)), batch_size=4)
        assert_same(ours, eager, found, expected)
    assert all(total.isfinite().all() for total in ours.sums.values())


class Cancelling(nn.Module):
    """Rows 2k and 2k + 1 of an example have nearly opposite gradients."""

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(64, 64, bias=False)

    def forward(self, x):
        return self.map(x)


@pytest.mark.usefixtures("no_compiler")
def test_an_example_whose_rows_cancel_has_its_norm_from_the_outer_form():
    torch.manual_seed(1)
    model = Cancelling()
    step, ours, eager = both(model)
    rows = torch.randn(2, 8, 64)
    x = torch.cat([rows, rows * (1 + 1e-4)], 1)
    sign = torch.cat([torch.ones(8), -torch.ones(8)])[None, :, None]

    def loss(model, x):
        return (model(x) * sign_input(x)).sum((1, 2)) * 1e3

    def sign_input(x):
        return torch.cat([torch.ones(8), -torch.ones(8)])[None, :, None]

    assert sign.shape == (1, 16, 1)
    found = step.add(loss, x, batch_size=2)
    expected = eager.add(lambda: loss(model, x), batch_size=2)
    torch.testing.assert_close(found.norms, expected.norms, rtol=0, atol=0)
    assert_same(ours, eager, found, expected)


@pytest.mark.usefixtures("no_compiler")
def test_what_a_trace_depends_on_is_traced_anew_and_nothing_else_is():
    model = Dropping()
    step, _, _ = both(model)
    rows = rows_of(4)
    for _ in range(3):
        step.add(lambda model, rows: squares(model, rows), rows, batch_size=4)
    assert step.num_traces == 1, "a lambda in a loop is the same function"
    step.add(squares, rows, batch_size=4)
    assert step.num_traces == 2
    model.eval()
    step.add(squares, rows, batch_size=4)
    assert step.num_traces == 3, "dropout is off"
    step.add(squares, rows_of(3), batch_size=3)
    assert step.num_traces == 4
    for factor in (1.0, 2.0, 2.0):
        step.add(lambda m, rows, factor=factor: factor * squares(m, rows), rows, batch_size=4)
    assert step.num_traces == 6


@pytest.mark.usefixtures("no_compiler")
def test_endless_new_shapes_are_an_error(monkeypatch):
    monkeypatch.setattr(compiled, "_MOST_TRACES", 2)
    step, ours, _ = both(Dropping())
    step.add(squares, rows_of(2), batch_size=2)
    step.add(squares, rows_of(3), batch_size=3)
    before = {name: total.clone() for name, total in ours.sums.items()}
    with pytest.raises(CompilationError, match="3th time"):
        step.add(squares, rows_of(4), batch_size=4)
    assert all(torch.equal(before[name], total) for name, total in ours.sums.items())


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(6, 1)

    def forward(self, x):
        return self.map(x).squeeze(-1) * (2.0 if bool((x > 0).all()) else 1.0)


class Unused(nn.Module):
    def __init__(self):
        super().__init__()
        self.map, self.left_out = nn.Linear(6, 1), nn.Linear(2, 2)

    def forward(self, x):
        return self.map(x).squeeze(-1)


def test_a_course_that_depends_on_values_is_refused():
    step, ours, _ = both(Branching())
    with pytest.raises(CompilationError, match="cannot be traced"):
        step.add(squares, rows_of(3), batch_size=3)
    assert not any(total.any() for total in ours.sums.values())


def test_a_tensor_that_is_no_input_is_refused():
    hidden = torch.ones(3)
    step, _, _ = both(Dropping())
    with pytest.raises(CompilationError, match="inputs, parameters nor buffers"):
        step.add(lambda model, rows: squares(model, rows) * hidden, rows_of(3), batch_size=3)


def test_the_refusals_of_the_eager_step_hold_in_the_trace():
    step, _, _ = both(Unused())
    with pytest.raises(MissingRuleError, match="saw no gradient"):
        step.add(squares, rows_of(3), batch_size=3)
    step, _, _ = both(Dropping())
    with pytest.raises(InvalidInputError, match="weights"):
        step.add(squares, rows_of(3), batch_size=3, weights=torch.tensor([1.0, 0.5, 1.0]))


@pytest.mark.parametrize("what", ["norms", "sums"])
def test_a_compiler_that_computes_something_else_is_found_out(monkeypatch, what):
    def wrong(graph, **_):
        def run(*arguments):
            sums, sq_norms_B, losses_B, needs_eager = graph(*arguments)
            if what == "norms":
                return sums, sq_norms_B * 0.99, losses_B, needs_eager
            return {n: 1.01 * s for n, s in sums.items()}, sq_norms_B, losses_B, needs_eager

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    step, ours, _ = both(Dropping().eval())
    with pytest.raises(CompilationError, match="disagrees"):
        step.add(squares, rows_of(3), batch_size=3)
    assert not any(total.any() for total in ours.sums.values())


def test_a_graph_whose_first_microbatch_went_the_eager_way_is_compared_at_its_first_use(monkeypatch):
    def wrong(graph, **_):
        def run(*arguments):
            sums, sq_norms_B, losses_B, needs_eager = graph(*arguments)
            return {n: 2.0 * s for n, s in sums.items()}, sq_norms_B, losses_B, needs_eager

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    step, ours, eager = both(Dropping().eval())
    x, y = rows_of(3)
    broken = y.clone()
    broken[0] = float("nan")
    found = step.add(squares, (x, broken), batch_size=3)
    expected = eager.add(lambda: squares(step._model, (x, broken)), batch_size=3)
    assert_same(ours, eager, found, expected)
    for _ in range(2):
        with pytest.raises(CompilationError, match="disagrees"):
            step.add(squares, (x, y), batch_size=3)
    assert_same(ours, eager, found, expected)
    assert step.num_traces == 1


def test_one_example_s_wrong_norm_is_not_hidden_by_the_large_ones(monkeypatch):
    def wrong(graph, **_):
        def run(*arguments):
            sums, sq_norms_B, losses_B, needs_eager = graph(*arguments)
            smallest = sq_norms_B == sq_norms_B.min()
            return sums, torch.where(smallest, 0.25 * sq_norms_B, sq_norms_B), losses_B, needs_eager

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    step, _, _ = both(Dropping().eval())
    x, y = rows_of(3)
    y[0] = 1e6
    with pytest.raises(CompilationError, match="a norm"):
        step.add(squares, (x, y), batch_size=3)


def bfloat16():
    return torch.autocast("cpu", dtype=torch.bfloat16)


def length_and_norm(step, inputs, example):
    """Returns how long an example's part of the sum is, and its clipped norm, of the graph made last."""
    weights = torch.zeros(len(inputs))
    weights[example] = 1.0
    with full_precision(inputs.device):  # as add() does; other settings would be compiled anew
        alone = step._graphs[-1].run(step._state(), inputs, weights)
    length = torch.stack([total.double().norm() for total in alone.sums.values()]).norm()
    return float(length), min(C, float(alone.sq_norms_KB.sum(0)[example].double().sqrt()))


def test_under_autocast_inductor_rounds_as_the_eager_step_does():
    model = text_model(tie_head=True)
    step, ours, eager = both(model)
    for _ in range(2):
        ids = torch.randint(0, 60, (4, 12))
        with bfloat16():
            found = step.add(lm_loss, ids, batch_size=4)
            expected = eager.add(lambda ids=ids: lm_loss(model, ids), batch_size=4)
        # Another rounding of one activation to bfloat16 would show as 2^-9 of it.
        torch.testing.assert_close(found.norms, expected.norms, rtol=1e-5, atol=0)
        for name, total in eager.sums.items():
            assert (ours.sums[name] - total).norm() <= 1e-5 * total.norm()
        length, norm = length_and_norm(step, ids, 1)
        assert abs(length / norm - 1) < 1e-6
    assert step.num_traces == 1


def test_without_that_option_a_norm_would_be_of_other_numbers_than_the_sum(monkeypatch):
    monkeypatch.setattr(compiled, "_COMPILER_OPTIONS", {"fallback_random": True})
    step, _, _ = both(text_model(tie_head=True))
    ids = torch.randint(0, 60, (4, 12))
    with bfloat16():
        step.add(lm_loss, ids, batch_size=4)
    length, norm = length_and_norm(step, ids, 1)
    assert abs(length / norm - 1) > 2e-6


@pytest.mark.usefixtures("no_compiler")
def test_parameters_of_16_bits_are_traced_as_they_run():
    model = Dropping().bfloat16().eval()
    step, ours, eager = both(model)
    rows = tuple(part.bfloat16() for part in rows_of(4))
    found = step.add(squares, rows, batch_size=4)
    assert_same(ours, eager, found, eager.add(lambda: squares(model, rows), batch_size=4))
    assert all(total.dtype is torch.float32 for total in ours.sums.values())


@pytest.mark.usefixtures("no_compiler")
def test_autocast_is_part_of_what_a_trace_was_made_with():
    model = Dropping().eval()
    step, _, _ = both(model)
    rows = rows_of(4)
    plain = step.add(squares, rows, batch_size=4)
    for _ in range(2):
        with bfloat16():
            narrow = step.add(squares, rows, batch_size=4)
    assert step.num_traces == 2
    assert not torch.equal(plain.losses, narrow.losses)
    assert torch.equal(step.add(squares, rows, batch_size=4).losses, plain.losses)
    assert step.num_traces == 2


def test_a_graph_whose_norms_do_not_bound_what_it_adds_is_found_out(monkeypatch):
    def wrong(graph, **_):
        def run(state, inputs, weights_B):
            sums, *rest = graph(state, inputs, weights_B)
            # As the eager step's within its tolerance, and longer than the norm says where an example is alone.
            return ({n: 1.01 * s for n, s in sums.items()} if weights_B.sum() == 1 else sums), *rest

        return run

    monkeypatch.setattr(torch, "compile", wrong)
    step, ours, _ = both(Dropping().eval())
    with pytest.raises(CompilationError, match="what one example adds"):
        step.add(squares, rows_of(3), batch_size=3)
    assert not any(total.any() for total in ours.sums.values())


def test_a_missing_compiler_is_said_with_its_remedy(monkeypatch):
    def failing(graph, **_):
        def run(*_):
            raise torch._dynamo.exc.InternalTorchDynamoError("no working C++ compiler found")

        return run

    monkeypatch.setattr(torch, "compile", failing)
    step, _, _ = both(Dropping())
    with pytest.raises(CompilationError, match=r"g\+\+"):
        step.add(squares, rows_of(3), batch_size=3)
