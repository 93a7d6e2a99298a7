"""Schedules and samplers against closed forms, a plain loop, and the schedulers of diffusers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from specdef_jax.errors import ProblemError
from specdef_jax.models import diffusion, unet
from specdef_jax.models.unet_config import UNetConfig
from tests.models.helpers_unet import SMALL, inputs, perturbed

KEY = jax.random.key(1)
A = diffusion.alphas_cumprod()


def test_the_schedule_of_stable_diffusion():
    # sqrt(beta) is linear: the ends, and the sum of the logarithms by the definition
    assert A[0] == pytest.approx(1 - 0.00085)
    assert A[-1] / A[-2] == pytest.approx(1 - 0.012)
    roots = [0.00085**0.5 + i / 999 * (0.012**0.5 - 0.00085**0.5) for i in range(1000)]
    assert np.log(A[-1]) == pytest.approx(sum(np.log1p(-(r**2)) for r in roots))
    assert A[-1] == pytest.approx(0.0047, abs=5e-5)  # as published


def test_noise_is_added_to_each_by_its_timestep():
    x, noise = jax.random.normal(KEY, (3, 2, 4, 5)), jnp.ones((3, 2, 4, 5))
    found = diffusion.add_noise(A, x, noise, jnp.array([0, 500, 999]))
    for i, t in enumerate((0, 500, 999)):
        np.testing.assert_allclose(found[i], A[t] ** 0.5 * x[i] + (1 - A[t]) ** 0.5, atol=1e-14)
    one = diffusion.add_noise(A, x, noise, jnp.array(500))
    np.testing.assert_allclose(one[1], found[1], atol=1e-14)


def toy(params, x, t, states):
    """A model that looks at everything it is given."""
    return jnp.tanh(params * x + jnp.sin(t / 100)) + jnp.mean(states, axis=(1, 2))[:, None, None, None]


TOY = jnp.asarray(0.7), jax.random.normal(KEY, (2, 4, 3, 3)), jax.random.normal(KEY, (2, 5, 6))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 7, 50])
def test_ddim_is_its_definition_step_by_step(n, spacing):
    params, noise, states = TOY
    found = diffusion.denoise(toy, params, noise, states, diffusion.ddim(n, spacing=spacing))
    starts = {
        "leading": [i * (1000 // n) + 1 for i in range(n)],
        "linspace": np.linspace(0, 999, n).round().astype(int) if n > 1 else [0],
        "trailing": [round(1000 - i * 1000 / n) - 1 for i in range(n)],
    }
    x = np.asarray(noise)
    for t in sorted(starts[spacing], reverse=True):
        before = t - 1000 // n
        a, b = A[t], A[before] if before >= 0 else A[0]
        eps = np.asarray(toy(params, x, float(t), states))
        clean = (x - np.sqrt(1 - a) * eps) / np.sqrt(a)
        x = np.sqrt(b) * clean + np.sqrt(1 - b) * eps
    np.testing.assert_allclose(found, x, atol=1e-10 * np.abs(x).max())


@pytest.mark.parametrize("n", [1, 9])
def test_euler_is_its_definition_step_by_step(n):
    params, noise, states = TOY
    sampler = diffusion.euler(n)
    found = diffusion.denoise(toy, params, noise, states, sampler)
    sigma = np.sqrt((1 - A) / A)
    times = [999 - 999 * i / (n - 1) for i in range(n)] if n > 1 else [0.0]
    sigmas = [*(np.interp(t, np.arange(1000), sigma) for t in times), 0.0]
    x = np.asarray(noise) * sigmas[0]
    for t, here, there in zip(times, sigmas, sigmas[1:], strict=False):
        x = x + (there - here) * np.asarray(toy(params, x / np.sqrt(here**2 + 1), t, states))
    np.testing.assert_allclose(found, x, atol=1e-10 * np.abs(x).max())


def test_ddim_and_euler_are_one_method_in_two_coordinates():
    # 40 divides 1000, so that DDIM's next timestep is the next of the table; both end at no noise.
    params, noise, states = TOY
    ddim = diffusion.ddim(40, to_one=True)
    euler = diffusion.euler(40, spacing="leading")
    a = A[int(ddim.timesteps[0])]
    start = noise * np.sqrt(1 / a) / euler.start  # x / sqrt(a) is what Euler's method carries
    found = diffusion.denoise(toy, params, start, states, euler)
    np.testing.assert_allclose(diffusion.denoise(toy, params, noise, states, ddim), found, rtol=1e-10)
    assert float(euler.start) == pytest.approx(float(np.sqrt(1 / a)))


@pytest.mark.parametrize(
    ("sampler", "signal"),
    [(diffusion.ddim(1000, offset=0, to_one=True), 1.0), (diffusion.euler(1000), float(A[-1] ** 0.5))],
    ids=["ddim", "euler"],
)
def test_the_flow_of_gaussian_data_is_that_of_the_closed_form(sampler, signal):
    # Of x0 ~ N(m, s^2) the best prediction of the noise is linear, and its flow keeps quantiles.
    m, s = 0.8, 0.3

    def best(params, x, t, states):
        a = params[t.astype(int)]
        return jnp.sqrt(1 - a) * (x - jnp.sqrt(a) * m) / (a * s**2 + 1 - a)

    noise = jax.random.normal(KEY, (1, 1, 8, 8))
    a, x = A[-1], signal * sampler.start * noise
    z = (x - np.sqrt(a) * m) / np.sqrt(a * s**2 + 1 - a)
    found = diffusion.denoise(best, jnp.asarray(A), noise, TOY[2][:1], sampler)
    # Of first order in 1000 steps.
    np.testing.assert_allclose(found, m + s * z, atol=0.012)


def test_guidance_moves_the_prediction():
    params, noise, states = TOY
    sampler = diffusion.ddim(5)
    empty = jnp.zeros_like(states)

    def guided(params, x, t, states):
        plain = toy(params, x, t, jnp.zeros_like(states))
        return plain + 7.5 * (toy(params, x, t, states) - plain)

    found = diffusion.denoise(toy, params, noise, states, sampler, guidance=7.5, unconditional=empty)
    np.testing.assert_allclose(found, diffusion.denoise(guided, params, noise, states, sampler), atol=1e-10)
    one = diffusion.denoise(toy, params, noise, states, sampler, guidance=1.0, unconditional=empty)
    np.testing.assert_allclose(one, diffusion.denoise(toy, params, noise, states, sampler), atol=1e-10)
    assert float(jnp.abs(found - one).max()) > 0.1
    with pytest.raises(ProblemError, match="give both"):
        diffusion.denoise(toy, params, noise, states, sampler, guidance=7.5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_unet_denoises_in_one_program(dtype):
    config = UNetConfig.from_json(SMALL)
    params = perturbed(config, dtype)
    noise, _, states = inputs(config, dtype=dtype)
    model, sampler = unet.bound(config), diffusion.ddim(3)
    found = diffusion.denoise(model, params, noise, states, sampler)
    step = jax.jit(model)
    x = noise.astype(jnp.float32)
    for t, keep, push in zip(sampler.timesteps, sampler.keep, sampler.push, strict=True):
        x = keep * x + push * step(params, x.astype(dtype), t, states).astype(jnp.float32)
    assert found.dtype == dtype
    scale = float(jnp.abs(x).max())
    bound = 1e-5 if dtype == "float32" else 0.02
    assert float(jnp.abs(found.astype(jnp.float32) - x).max()) < bound * scale


def test_steps_that_cannot_be_taken_are_refused():
    for n in (0, 1001):
        with pytest.raises(ProblemError, match=f"{n} steps"):
            diffusion.euler(n)
    with pytest.raises(ProblemError, match="offset 1 takes timestep 1000"):
        diffusion.ddim(1000)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("n", [1, 7, 30, 50])
@pytest.mark.filterwarnings("ignore")
def test_the_schedulers_of_diffusers(n, spacing):
    torch, diffusers = pytest.importorskip("torch"), pytest.importorskip("diffusers")
    betas = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
    options = betas | {"timestep_spacing": spacing, "steps_offset": 1}
    params, noise, states = TOY
    for ours, theirs in (
        (
            diffusion.ddim(n, spacing=spacing),
            diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=False, **options),
        ),
        (
            diffusion.ddim(n, spacing=spacing, to_one=True),
            diffusers.DDIMScheduler(clip_sample=False, **options),
        ),
        (diffusion.euler(n, spacing=spacing), diffusers.EulerDiscreteScheduler(**options)),
    ):
        theirs.set_timesteps(n)
        np.testing.assert_allclose(ours.timesteps, theirs.timesteps.numpy(), rtol=1e-6)
        assert float(ours.start) == pytest.approx(float(theirs.init_noise_sigma), rel=1e-4)
        x = torch.from_numpy(np.array(noise)) * theirs.init_noise_sigma
        for t in theirs.timesteps:
            seen = theirs.scale_model_input(x, t)
            eps = toy(params, jnp.asarray(seen.numpy()), float(t), states)
            x = theirs.step(torch.from_numpy(np.array(eps)), t, x).prev_sample
        found = diffusion.denoise(toy, params, noise, states, ours)
        # Their tables are in float32.
        assert np.abs(found - x.numpy()).max() < 1e-3 * np.abs(x.numpy()).max()
