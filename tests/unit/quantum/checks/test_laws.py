"""The checks hold, and each one fails when what it looks at is broken on purpose."""

from dp_flash_attention.quantum import exact_noise, layered_noise
from dp_flash_attention.quantum.checks import laws
from dp_flash_attention.quantum.evidence import run_checks


def failing(check, *arguments):
    return [row.name for row in check(*arguments) if not row.holds]


def test_every_check_holds_and_shows_something():
    results = list(run_checks(laws.laws_checks()))
    assert [row for result in results for row in result.rows if not row.holds] == []
    assert [len(result.rows) for result in results] == [2, 2, 4, 3]


def test_a_table_of_the_wrong_side_fails(monkeypatch):
    from fractions import Fraction

    from dp_flash_attention.noise import wide_discrete_gaussian

    # The two-sided table: zero half as likely as it has to be.
    monkeypatch.setattr(wide_discrete_gaussian, "_one_sided", lambda table: (table, Fraction(0)))
    assert "wide noise, σ = 64: distance" in failing(laws.wide_law)


def test_a_coin_of_another_law_fails(monkeypatch):
    from decimal import Decimal

    from dp_flash_attention.noise.wide_skellam import WideSkellam

    true = WideSkellam.acceptance
    monkeypatch.setattr(
        WideSkellam, "acceptance", lambda self, scaled, low: true(self, scaled, low) * Decimal("1.000000001")
    )
    assert failing(laws.wide_skellam) == ["wide Skellam, μ = 2^28: table and coin"]


def test_the_gaussian_in_place_of_skellam_s_law_fails(monkeypatch):
    """They differ by 1/μ, here 4e-9: the row's bound is finer."""
    from decimal import Decimal

    from dp_flash_attention.noise.wide_skellam import SkellamLaw

    def gaussian(self, y):
        return (-Decimal(y * y) / 2**29).exp()

    monkeypatch.setattr(SkellamLaw, "probability", gaussian)
    assert failing(laws.wide_skellam) == ["wide Skellam, μ = 2^28: table and coin"]


def test_shares_of_one_nth_fail(monkeypatch):
    true = layered_noise.plan_layered

    def careless(**arguments):
        import dataclasses
        from fractions import Fraction

        plan = true(**arguments)
        thin = Fraction(plan.num_honest, plan.num_parties)
        return dataclasses.replace(plan, share_variance=plan.share_variance * thin)

    monkeypatch.setattr(layered_noise, "plan_layered", careless)
    assert failing(laws.layered, 2000) == [
        "LayeredNoise: ε of 4 honest shares, skellam",
        "LayeredNoise: ε of 4 honest shares, discrete gaussian",
    ]


def test_less_noise_than_planned_fails(monkeypatch):
    stream = exact_noise.ExactNoise.stream

    def half(self, key, num, consume, **settings):
        stream(self, key, num, lambda start, noise: consume(start, noise // 2), **settings)

    monkeypatch.setattr(exact_noise.ExactNoise, "stream", half)
    assert failing(laws.layered, 20_000) == [
        "LayeredNoise: 4 honest of 6, skellam",
        "LayeredNoise: 4 honest of 6, discrete gaussian",
    ]


def test_another_skellam_table_another_bound_and_another_tau_fail(monkeypatch):
    table, rdp, tau = (
        laws.skellam_table,
        laws.skellam_rdp,
        laws.summed_discrete_gaussian_tau,
    )
    from fractions import Fraction

    monkeypatch.setattr(laws, "skellam_table", lambda variance: table(variance * Fraction(101, 100)))
    monkeypatch.setattr(laws, "skellam_rdp", lambda *a, **k: 0.9 * rdp(*a, **k))
    monkeypatch.setattr(laws, "summed_discrete_gaussian_tau", lambda **k: 0.02 * tau(**k))
    assert failing(laws.summed_laws) == [
        "Skellam: table, μ = 100",
        "Skellam: Rényi bound",
        "summed discrete Gaussians: τ",
    ]
