"""Where λ comes from: distributions of the mixing weight, each with the weight of MixupE's regularizer under it.

Everything is drawn from torch generators, on the device of the batch, without synchronising: the same seed gives the
same λ, on one device and version of PyTorch.

The regularizer's weight is w = E[1 - λ'], λ' being λ under the law that mixup's loss has when each label is written as
the own one (MixupE, Zou et al., 2023, §2.1). For any law of λ that is 2·E[λ(1 - λ)], since a pair's loss holds its first
label with weight λ at distance 1 - λ, and its second with weight 1 - λ at distance λ.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import checks
from ..conventions import check_range, kept, moved, rewritten, vector, wide_dtype
from .randomness import Source, Stream, from_stream, standard_gamma

# Gamma(a) as a float64 underflows with probability about 1e-308^a; for two of them at once, which alone would spoil their
# ratio, that is 1e-12 here. Below, logarithms are drawn, in twice as many calls.
_SMALLEST_DIRECT = {torch.float64: 0.02, torch.float32: 0.16}
FOLDS = ("none", "max")


def expected_a_lambda(alpha: float, beta: float | None = None) -> float:
    """The weight w of MixupE's regularizer for λ ~ Beta(alpha, beta): w = 2αβ / ((α + β)(α + β + 1)).

    w = E[1 - λ] under D_λ = α/(α+β)·Beta(α+1, β) + β/(α+β)·Beta(β+1, α) (MixupE, Zou et al., 2023, §2.1 and 2.3), which
    is 2·E[λ(1 - λ)] under Beta(α, β). For α = β it is α / (2α + 1).

    Args:
        alpha: first parameter, > 0.
        beta: second parameter, > 0; alpha if None.

    Returns:
        w in (0, 1/2).

    Raises:
        ValueError, TypeError: if a parameter is not a finite number > 0.
    """
    alpha = checks.positive("alpha", alpha)
    beta = alpha if beta is None else checks.positive("beta", beta)
    total = alpha + beta
    return 2 * (alpha / total) * (beta / (total + 1))


def _log_beta(a: float, b: float) -> float:
    return math.lgamma(a) + math.lgamma(b) - math.lgamma(a + b)


def _beta_below_half(a: float, b: float) -> float:
    """P(X < 1/2) of X ~ Beta(a, b): the hypergeometric series of the incomplete beta function, whose terms are positive.

    Of the two tails the one is summed whose terms fall from the first on.
    """
    if b > a + 1:
        return 1 - _beta_below_half(b, a)
    term = total = 1.0
    index = 0
    while term > 1e-17 * total:
        term *= (a + b + index) / (a + 1 + index) / 2
        total += term
        index += 1
    return total * math.exp(-(a + b) * math.log(2) - _log_beta(a, b)) / a


def _log_gamma_variates(concentration: Tensor, generator: Source) -> Tensor:
    """log G, G ~ Gamma(a, 1): log of Gamma(a + 1) plus log(U)/a (Marsaglia and Tsang, 2000, §6)."""
    boosted = standard_gamma(concentration + 1, generator)
    uniform = rand(concentration.shape, generator, concentration.device, concentration.dtype)
    return boosted.log() + torch.log1p(-uniform) / concentration


class _Gammas:
    """Weights that are Gamma variates over their sum: Dirichlet's, of which Beta's are the first of two."""

    def __init__(self, concentration: tuple[float, ...]):
        self.concentration = concentration
        self._least = min(concentration)
        self._on_cpu = torch.tensor(concentration, dtype=torch.float64, device="cpu")
        self._on_devices: dict[torch.device, Tensor] = {}
        self._ramped = False
        self._scalars = [torch.tensor(value, dtype=torch.float32, device="cpu") for value in concentration]

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_on_devices": {}}

    def share(self, tensors: dict[torch.device, Tensor], least: float) -> None:
        """Keep the numbers, of one epoch of a ramp down to ``least``, in ``tensors``, where graphs read those of every epoch."""
        self._on_devices, self._ramped, self._least = tensors, True, least
        for tensor in tensors.values():
            for place, value in zip(tensor.unbind(), self.concentration, strict=True):
                place.fill_(value)

    def _on_device(self, device: torch.device) -> Tensor:
        def make():
            return vector(self.concentration, wide_dtype(device), device)

        if self._ramped:
            return rewritten(self._on_devices, device, device, make, "a mixer with a ramp")
        return kept(self._on_devices, device, make)

    def draw(self, size: tuple[int, ...], generator: Source, device: torch.device) -> Tensor:
        """Shape (*size, K), float64 (see ``wide_dtype``), exact for concentrations as small as 1e-3 and below."""
        parameters = self._on_cpu
        if device.type != "cpu" and torch.compiler.is_compiling():
            # A number would be a constant of the graph, which a ramp of alpha would have to make again in every epoch; a
            # scalar on the CPU is an argument, and goes to the device without a synchronisation.
            ones = [torch.ones((), dtype=wide_dtype(device), device=device) for _ in self._scalars]
            parameters = torch.stack([one * scalar for one, scalar in zip(ones, self._scalars, strict=True)])
        elif device.type != "cpu":
            parameters = self._on_device(device)
        if size:
            parameters = parameters.expand(*size, len(self.concentration))
        if self._least < _SMALLEST_DIRECT[parameters.dtype]:
            return _log_gamma_variates(parameters, generator).softmax(-1)
        gammas = standard_gamma(parameters, generator)
        return gammas / gammas.sum(-1, keepdim=True)


def rand(size: Sequence[int], source: Source, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform in [0, 1). For a permutation, see :func:`mixupe_kernels.pairing.random`."""
    if source is None:
        return torch.rand(size, dtype=dtype, device=device)
    if isinstance(source, Stream):
        return from_stream(source.ticket, source.key, "rand", size, dtype, device)
    return torch.rand(size, dtype=dtype, device=device, generator=source)


class Distribution:
    """A law of λ. Subclasses define ``draw`` and ``expected_a_lambda``.

    Attributes:
        expected_a_lambda: w = 2·E[λ(1 - λ)], the weight of MixupE's regularizer; folding does not change it.
        expected_a_lambda_error: its standard error; 0 where it is a closed form.
        theta_mean: θ̄ = E[max(λ, 1 - λ)] in [1/2, 1]; mixup pulls a sample towards the mean by 1 - θ̄ on average (Carratino
            et al., 2022, §3). Neither it nor ``theta_variance`` is changed by folding.
        theta_variance: Var[max(λ, 1 - λ)], the strength of the noise that mixup adds to what it has pulled.
        fold: ``"none"``, or ``"max"`` for max(λ, 1 - λ), so that the own sample always weighs more.
    """

    expected_a_lambda: float
    expected_a_lambda_error: float = 0.0

    def __init__(self, fold: str = "none"):
        self.fold = checks.choice("fold", fold, FOLDS)

    def draw(self, size: tuple[int, ...], generator: Source, device: torch.device) -> Tensor:
        raise NotImplementedError

    @property
    def theta_mean(self) -> float:
        raise NotImplementedError

    @property
    def theta_variance(self) -> float:
        # (2θ - 1)² = 1 - 4λ(1 - λ), whose mean w gives. Rounding may leave less than 0 where θ is constant.
        return max(0.0, (1 - 2 * self.expected_a_lambda) / 4 - (self.theta_mean - 0.5) ** 2)

    def sample(self, size: tuple[int, ...], generator: Source, device: torch.device) -> Tensor:
        """λ of shape ``size``, float32 in [0, 1], on ``device``."""
        lam = self.draw(size, generator, device)
        return torch.maximum(lam, 1 - lam) if self.fold == "max" else lam

    def __repr__(self) -> str:
        shown = ", ".join(
            f"{name}={value!r}"
            for name, value in vars(self).items()
            if not name.startswith(("expected", "gammas", "uniform", "theta"))
            and not (name == "fold" and value == "none")
        )
        return f"{type(self).__name__}({shown})"


class Beta(Distribution):
    """λ ~ Beta(alpha, beta) (mixup, Zhang et al., 2018); beta is alpha if None."""

    def __init__(self, alpha: float = 1.0, beta: float | None = None, *, fold: str = "none"):
        super().__init__(fold)
        self.alpha = checks.positive("alpha", alpha)
        self.beta = self.alpha if beta is None else checks.positive("beta", beta)
        self.expected_a_lambda = expected_a_lambda(self.alpha, self.beta)
        self.uniform = self.alpha == self.beta == 1  # and drawn as such
        self.gammas = _Gammas((self.alpha, self.beta))

    @property
    def theta_mean(self):
        if self.alpha == self.beta:  # 1/2 and the mean deviation, 1 / (4^α α B(α, α))
            return 0.5 + math.exp(-self.alpha * math.log(4) - _log_beta(self.alpha, self.alpha)) / self.alpha
        mean = self.alpha / (self.alpha + self.beta)
        return mean + _beta_below_half(self.alpha, self.beta) - 2 * mean * _beta_below_half(self.alpha + 1, self.beta)

    def draw(self, size, generator, device):
        if self.uniform:
            return rand(size, generator, device)
        return self.gammas.draw(size, generator, device).select(-1, 0).float()


class HalfBeta(Beta):
    """θ ~ Beta(alpha, alpha) restricted to [1/2, 1] (Carratino et al., 2022), which is max(λ, 1 - λ) of the whole one.

    With it, mixup's loss is the same in expectation as with the whole distribution.
    """

    def __init__(self, alpha: float = 1.0):
        super().__init__(alpha, fold="max")


class DLambda(Beta):
    """λ ~ D_λ = α/(α+β)·Beta(α+1, β) + β/(α+β)·Beta(β+1, α) (MixupE, §2.1): the law of the own label's weight.

    It is the law of λ with probability λ and of 1 - λ otherwise, λ ~ Beta(alpha, beta), and so has the same
    ``expected_a_lambda``.
    """

    def draw(self, size, generator, device):
        lam = super().draw(size, generator, device)
        keep = rand(size, generator, device) < lam
        return torch.where(keep, lam, 1 - lam)


class WShaped(Distribution):
    """λ = X/2 or (X + 1)/2 with equal probability, X ~ Beta(alpha, alpha): most mass at 0, 1/2 and 1.

    The mixture of "On Mixup Regularization" (Carratino et al., 2022), where alpha is 1/2.
    """

    def __init__(self, alpha: float = 0.5, *, fold: str = "none"):
        super().__init__(fold)
        self.alpha = checks.positive("alpha", alpha)
        # E[λ(1 - λ)] = (1 - E[X²]) / 4 and E[X²] = 1/4 + 1/(4(2α + 1)).
        self.expected_a_lambda = (1 - 0.25 - 0.25 / (2 * self.alpha + 1)) / 2
        self.gammas = _Gammas((self.alpha, self.alpha))

    @property
    def theta_mean(self):
        return 0.75  # |λ - 1/2| is X/2 or (1 - X)/2

    def draw(self, size, generator, device):
        x = self.gammas.draw(size, generator, device).select(-1, 0).float()
        upper = rand(size, generator, device) < 0.5
        return (x + upper) / 2


class Uniform(Distribution):
    """λ uniform on [low, high], 0 <= low <= high <= 1."""

    def __init__(self, low: float = 0.0, high: float = 1.0, *, fold: str = "none"):
        super().__init__(fold)
        self.low, self.high = checks.fraction("low", low), checks.fraction("high", high)
        if self.low > self.high:
            raise ValueError(f"low must be at most high = {self.high}, got {self.low}")
        square = (self.low**2 + self.low * self.high + self.high**2) / 3
        self.expected_a_lambda = self.low + self.high - 2 * square

    @property
    def theta_mean(self):
        low, high = self.low - 0.5, self.high - 0.5
        if low * high >= 0:
            return 0.5 + abs(low + high) / 2
        return 0.5 + (low**2 + high**2) / (2 * (high - low))

    def draw(self, size, generator, device):
        # lerp's result may round beyond its end points; [0, 1] itself needs no clamp.
        uniform = rand(size, generator, device)
        return (self.low + (self.high - self.low) * uniform).clamp_(self.low, self.high)


class Fixed(Distribution):
    """λ = value, in [0, 1], always."""

    def __init__(self, value: float, *, fold: str = "none"):
        super().__init__(fold)
        self.value = checks.fraction("value", value)
        self.expected_a_lambda = 2 * self.value * (1 - self.value)

    @property
    def theta_mean(self):
        return max(self.value, 1 - self.value)

    def draw(self, size, generator, device):
        return torch.full(size, self.value, dtype=torch.float32, device=device)


class Custom(Distribution):
    """λ = function(size, generator, device): a floating-point tensor of that shape on that device, values in [0, 1].

    Args:
        function: draws λ; its randomness should come from ``generator`` (torch's default where that is None).
        expected_a_lambda: w = 2·E[λ(1 - λ)] in [0, 1/2] where it is known. Else it is the mean over 2^20 draws on the CPU
            (of a seed of its own; no generator moves), and ``expected_a_lambda_error`` its standard error, at most 2.5e-4.
        fold: as for every distribution.

    Raises:
        TypeError, ValueError: if ``function`` is not callable or returns something else than is stated.
    """

    NUM_DRAWS = 2**20

    def __init__(self, function: Callable, expected_a_lambda: float | None = None, *, fold: str = "none"):
        super().__init__(fold)
        if not callable(function):
            raise TypeError(f"function must be callable, got {type(function).__name__} {function!r}")
        self.function = function
        if expected_a_lambda is None:
            lam = self._draws()
            product = 2 * lam * (1 - lam)
            self.expected_a_lambda = product.mean().item()
            self.expected_a_lambda_error = product.std().item() / math.sqrt(self.NUM_DRAWS)
        else:
            self.expected_a_lambda = checks.number(
                "expected_a_lambda", expected_a_lambda, "a number in [0, 0.5]", lambda w: 0 <= w <= 0.5
            )

    def _draws(self) -> Tensor:
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(0)
            return self.draw((self.NUM_DRAWS,), torch.Generator().manual_seed(0), torch.device("cpu")).double()

    @functools.cached_property
    def theta_mean(self):
        """By the same draws, made when it is first asked for; its standard error is at most 2.5e-4."""
        lam = self._draws()
        return torch.maximum(lam, 1 - lam).mean().item()

    def draw(self, size, generator, device):
        lam = self.function(size, generator, device)
        name = "function(size, generator, device)"
        return moved(name, check(name, lam, size, device), device, torch.float32)


class Dirichlet:
    """Weights of K mixed samples, Dirichlet(alpha, ..., alpha) (mixup, Zhang et al., 2018, §2); K = 2 is Beta(alpha, alpha).

    ``expected_a_lambda`` is w = K·E[λ_1 (1 - λ_1)] = (K - 1)α / (Kα + 1), by the same argument as for two samples.
    """

    def __init__(self, alpha: float = 1.0, num_samples: int = 2):
        self.alpha = checks.positive("alpha", alpha)
        self.num_samples = checks.positive_int("num_samples", num_samples)
        self.expected_a_lambda = (num_samples - 1) * self.alpha / (num_samples * self.alpha + 1)
        self.expected_a_lambda_error = 0.0
        self.gammas = _Gammas((self.alpha,) * self.num_samples)

    def sample(self, size: tuple[int, ...], generator: Source, device: torch.device) -> Tensor:
        """Weights of shape (*size, num_samples), float32, that sum to 1, on ``device``."""
        return self.gammas.draw(size, generator, device).float()

    def __repr__(self) -> str:
        return f"Dirichlet({self.alpha:g}, {self.num_samples})"


def check(name: str, lam: Tensor, size: tuple[int, ...], device: torch.device) -> Tensor:
    """What a caller's law returned for ``device``, if it is floating point of shape ``size`` in [0, 1].

    Raises:
        TypeError, ValueError: if it is anything else.
    """
    checks.tensor(name, lam)
    checks.shape(name, lam, size)
    checks.dtype(name, lam, checks.LOGITS_DTYPES)
    if lam.is_meta and device.type != "meta":
        raise ValueError(f"{name} must have values for {device}, got a meta tensor")
    if not torch.compiler.is_compiling():
        check_range(f"values of {name}", lam, 0, 1, "in [0, 1]")
    return lam


def as_distribution(value: Any) -> Distribution:
    """``value`` if it has what a :class:`Distribution` has, :class:`Custom` of it if it is a function.

    Raises:
        TypeError: for anything else.
    """
    if isinstance(value, Dirichlet):
        raise TypeError(f"lam_distribution must draw one λ a sample, got {value}: num_samples= is for more")
    if hasattr(value, "sample") and hasattr(value, "expected_a_lambda") and not isinstance(value, type):
        checks.number(
            "lam_distribution.expected_a_lambda",
            value.expected_a_lambda,
            "a number in [0, 0.5]",
            lambda w: 0 <= w <= 0.5,
        )
        return value
    if callable(value) and not isinstance(value, type):
        return Custom(value)
    raise TypeError(f"lam_distribution must be a distribution of mk.sampling or a function, got {value!r}")
