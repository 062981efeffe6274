"""Gradients of weight matrices, kept as their two factors.

For `y = x @ W + b` and a loss read from one forward pass of `n` positions,

    dL/dW = sum_i x_i^T delta_i = X^T Delta,   X: [n, d_in],   Delta: [n, d_out]

where `delta_i = dL/dy_i` is the vector-Jacobian product (VJP) at position `i` (paper, equation 8).
The rank is at most `n` (lemma 4.1), so everything about the gradient follows from the factors.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import einsum
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformer_lens import FactoredMatrix

from backward_lens_tl._checks import check_index
from backward_lens_tl.errors import InputError
from backward_lens_tl.models.precision import at_least_float32
from backward_lens_tl.models.sites import READING_MATRICES, MatrixName


@dataclass(frozen=True, repr=False)
class MatrixGradient:
    """The gradient of one weight matrix for each prompt of a batch, as factors.

    Signs are those of the raw gradient: gradient descent *subtracts* it. Padded positions hold
    zeros.

    A matrix that is divided into heads has an axis for them in the factor that is divided: `vjps`
    of `W_Q`, `W_K` and `W_V` (as many as there are key-value heads for the last two), `inputs` of
    `W_O`. The other factor has it too where the heads differ there, as under a patch of
    `hook_q_input` or `hook_result`. A mixture of experts has an axis for a token's slots instead,
    and `experts` says whose they are.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        inputs: `x_i`, what the matrix reads.
        vjps: `delta_i`, the gradient of the prompt's loss at the matrix's own output.
        mask: False at padding, and in one expert's gradient where a token was not routed to it.
        experts: The expert of each slot, -1 at padding; `None` without experts.
        n_experts: How many experts there are.
        joined_vjps: The gradient where what the matrix wrote is added to the residual stream, if it
            differs from `vjps`; `resid_vjps` has it in all cases.
        input_hook: TransformerLens's hook point that shows `x_i`, if there is one.
        output_hook: TransformerLens's hook point that shows the output, or what becomes of it on
            its way to the residual stream.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> loss = blt.target_nll(" Paris")
        >>> capture = blt.capture_gradients(model, "Lionel Messi plays for", loss)
        >>> gradient = capture["W_out", 6]
        >>> gradient.inputs.shape, gradient.vjps.shape  # [batch, pos, d_in], [batch, pos, d_out]
        (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        >>> gradient.rank()  # as many as the prompt has tokens
        6
    """

    matrix: MatrixName
    layer: int
    inputs: Float[Tensor, "batch pos *head d_in"]
    vjps: Float[Tensor, "batch pos *head_ d_out"]
    mask: Bool[Tensor, "batch pos"]
    experts: Int[Tensor, "batch pos slot"] | None = None
    n_experts: int | None = None
    joined_vjps: Float[Tensor, "batch pos d_model"] | None = None
    input_hook: str | None = None
    output_hook: str | None = None

    def __repr__(self) -> str:
        inputs, vjps = list(self.inputs.shape), list(self.vjps.shape)
        experts = "" if self.n_experts is None else f", {self.n_experts} experts"
        name = f"{self.matrix} of layer {self.layer}"
        return f"MatrixGradient({name}, x {inputs}, delta {vjps}{experts})"

    @property
    def reads_residual(self) -> bool:
        """Whether the matrix reads the residual stream; if not, it writes to it."""
        return self.matrix in READING_MATRICES

    @property
    def spanning_set(self) -> Float[Tensor, "batch pos d_model"]:
        """The factor of width `d_model`: `x_i` of matrices that read the stream, else `delta_i`.

        Every neuron of the gradient is a combination of these vectors (paper, section 4.2), and so
        is every head's part. The experts of one token all get the same `delta_i` times the router's
        weight: theirs are summed.

        Raises:
            InputError: If heads, or experts, read or write differently; then each has its own.
        """
        factor = self.inputs if self.reads_residual else self.vjps
        if factor.ndim == 3:
            return factor
        if self.experts is not None and not self.reads_residual:
            return factor.sum(2)
        raise InputError(
            f"the {self._part}s of {self.matrix} in layer {self.layer} differ at the residual "
            f"stream, as under a patch; ask for one of them with .{self._part}(index)"
        )

    @property
    def resid_vjps(self) -> Float[Tensor, "batch pos d_model"]:
        """The VJPs where what a writing matrix wrote is added to the residual stream.

        They equal `vjps` unless a norm, a scale, a router or a caller's hook comes in between.
        `-resid_vjps` is what a step of gradient descent wants to add to the stream; `-vjps` is what
        it adds to the matrix's own output, which the norm then changes.

        Raises:
            InputError: If the matrix reads the residual stream.
        """
        if self.reads_residual:
            raise InputError(
                f"{self.matrix} reads the residual stream and does not write to it; W_O and W_out "
                "have resid_vjps"
            )
        return self.spanning_set if self.joined_vjps is None else self.joined_vjps

    @cached_property
    def norms(self) -> Float[Tensor, "batch pos"]:
        """`||delta_i||_2`, how strongly each position writes; the colour of the paper's tables.

        Over all heads, or all of a token's experts, together.
        """
        return _norms(self.vjps)

    @cached_property
    def input_norms(self) -> Float[Tensor, "batch pos"]:
        """`||x_i||_2`, how long what the matrix read is; over all heads or experts together."""
        return _norms(self.inputs)

    @cached_property
    def is_zero(self) -> Bool[Tensor, "batch pos"]:
        """Where a position adds nothing to the gradient, because `x_i` or `delta_i` is zero.

        With a loss on the last position alone this is every other position of the last layer
        (paper, appendix A). Padding is zero as well.
        """
        no_input, no_vjp = (
            (factor if factor.ndim == 4 else factor[:, :, None]).eq(0).all(-1)
            for factor in (self.inputs, self.vjps)
        )
        return (no_input | no_vjp).all(-1)

    # --- parts ---------------------------------------------------------------------------------

    @property
    def n_heads(self) -> int | None:
        """Heads that the matrix is divided into, or `None`."""
        if self.experts is not None or self.inputs.ndim + self.vjps.ndim == 6:
            return None
        return max(factor.shape[2] for factor in (self.inputs, self.vjps) if factor.ndim == 4)

    def head(self, index: int) -> MatrixGradient:
        """The gradient of one head's part of an attention matrix.

        Args:
            index: The head, from 0; a key-value head for `W_K` and `W_V`.

        Returns:
            Its factors, without an axis for heads.

        Raises:
            InputError: If there is no such head.

        Examples:
            >>> prompt, loss = "Lionel Messi plays for", blt.target_nll(" Paris")
            >>> capture = blt.capture_gradients(model, prompt, loss, matrices="W_Q")
            >>> capture["W_Q", 5].n_heads
            4
            >>> capture["W_Q", 5].head(2)
            MatrixGradient(W_Q of layer 5, x [1, 6, 128], delta [1, 6, 32])
        """
        if self.n_heads is None:
            raise InputError(f"{self.matrix} of layer {self.layer} is not divided into heads")
        check_index("head", index, self.n_heads)
        inputs, vjps = (
            factor[:, :, index] if factor.ndim == 4 else factor
            for factor in (self.inputs, self.vjps)
        )
        return replace(self, inputs=inputs, vjps=vjps, input_hook=None, output_hook=None)

    def expert(self, index: int) -> MatrixGradient:
        """The gradient of one expert's matrix.

        Args:
            index: The expert, from 0.

        Returns:
            Its factors, without an axis for slots; `mask` is True only at the tokens that were
            routed to it.

        Raises:
            InputError: If there is no such expert.

        Examples:
            >>> gradient = blt.MatrixGradient(
            ...     "W_out",
            ...     layer=0,
            ...     inputs=torch.ones(1, 3, 1, 8),  # [batch, pos, slot, d_in]
            ...     vjps=torch.ones(1, 3, 4),  # [batch, pos, d_out]
            ...     mask=torch.ones(1, 3, dtype=torch.bool),
            ...     experts=torch.tensor([[[0], [1], [1]]]),
            ...     n_experts=2,
            ... )
            >>> gradient.expert(1).mask.tolist()
            [[False, True, True]]
        """
        if self.experts is None or self.n_experts is None:
            raise InputError(f"{self.matrix} of layer {self.layer} has no experts")
        check_index("expert", index, self.n_experts)
        routed = self.experts == index
        here = routed.any(-1)
        elsewhere = ~here[..., None]
        inputs = self.inputs
        if inputs.ndim == 4:
            slot = routed.int().argmax(-1)[..., None, None]
            inputs = inputs.take_along_dim(slot, 2)[:, :, 0]
        joined = self.joined_vjps
        return replace(
            self,
            inputs=inputs.masked_fill(elsewhere, 0),
            # An expert that a token is routed to twice reads the same both times.
            vjps=self.vjps.masked_fill(~routed[..., None], 0).sum(2),
            mask=here,
            experts=None,
            n_experts=None,
            joined_vjps=None if joined is None else joined.masked_fill(elsewhere, 0),
        )

    # --- the gradient of one prompt ------------------------------------------------------------

    def factored(self, batch: int | None = None) -> FactoredMatrix:
        """The gradient of one prompt as TransformerLens's `FactoredMatrix`.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            `A @ B` with `A = X^T`, `[d_in, n]`, and `B = Delta`, `[n, d_out]`; `n` is the
            prompt's own length. Heads lie side by side in the side that they divide.

        Examples:
            >>> factored = gradient.factored()
            >>> factored.A.shape, factored.B.shape  # X^T [d_in, n], Delta [n, d_out]
            (torch.Size([512, 6]), torch.Size([6, 128]))
        """
        inputs, vjps = self._joined(batch)
        return FactoredMatrix(inputs.T, vjps)

    def dense(self, batch: int | None = None) -> Float[Tensor, "*head d_in d_out"]:
        """The gradient of one prompt as a matrix.

        This is the only method that allocates `d_in * d_out` numbers: 9.4 MB for an MLP matrix of
        GPT-2 small in float32, 41 MB for GPT-2 xl.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            `X^T Delta`, with a first axis for heads or experts where there are any.

        Examples:
            >>> gradient.dense().shape  # [d_in, d_out]
            torch.Size([512, 128])
            >>> inputs, vjps = gradient.inputs[0], gradient.vjps[0]
            >>> torch.allclose(gradient.dense(), inputs.T @ vjps)
            True
        """
        if self.n_experts is not None:
            parts = [self.expert(index).dense(batch) for index in range(self.n_experts)]
            return torch.stack(parts)
        inputs, vjps = self._real(batch)
        left, right = ("head " if factor.ndim == 3 else "" for factor in (inputs, vjps))
        heads = left or right
        pattern = f"pos {left}d_in, pos {right}d_out -> {heads}d_in d_out"
        with self._own_precision():
            dense: Tensor = einsum(inputs, vjps, pattern)
        return dense

    def bias(self, batch: int | None = None) -> Float[Tensor, "*head d_out"]:
        """The gradient of one prompt with respect to the bias that is added to the output.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            `sum_i delta_i`, with a first axis for heads where `vjps` has one, or for experts. For a
            layer without a bias it is the gradient at one of zero.

        Raises:
            InputError: If heads write differently to the residual stream, which has one bias.

        Examples:
            >>> torch.allclose(gradient.bias(), gradient.vjps[0].sum(0))
            True
        """
        if self.n_experts is not None:
            return torch.stack([self.expert(index).bias(batch) for index in range(self.n_experts)])
        if not self.reads_residual:
            self._joined(batch)  # one bias for all heads, which have to agree
        return self._real(batch)[1].sum(0)

    def neuron(self, index: int, batch: int | None = None) -> Float[Tensor, "d_model"]:
        """One neuron of the gradient: the vector of width `d_model` that one hidden unit receives.

        Args:
            index: The hidden unit, from 0: of the MLP, or of all heads side by side.
            batch: Which prompt; may be left out where there is one.

        Returns:
            For index `j`, column `j` of the gradient of a matrix that reads the residual stream,
            `sum_i delta_i[j] x_i` (paper, equation 9), or row `j` of one that writes to it,
            `sum_i x_i[j] delta_i` (equation 10).

        Raises:
            InputError: If there is no such hidden unit.

        Examples:
            >>> gradient.neuron(17).shape  # [d_model]
            torch.Size([128])
            >>> torch.allclose(gradient.neuron(17), gradient.dense()[17])
            True
        """
        check_index("neuron", index, self._combination(batch)[0].shape[1])
        return self.neurons(int(index), int(index) + 1, batch)[0]

    def neurons(
        self, start: int, stop: int, batch: int | None = None
    ) -> Float[Tensor, "n d_model"]:
        """Neurons of the gradient side by side, for work on all of them block by block.

        All at once would be the `d_in x d_out` matrix itself.

        Args:
            start: The first hidden unit, from 0.
            stop: The hidden unit after the last one.
            batch: Which prompt; may be left out where there is one.

        Returns:
            `neuron(j)` in row `j - start`.

        Raises:
            InputError: If there are no such hidden units.

        Examples:
            >>> gradient.neurons(0, 64).shape  # [n, d_model]
            torch.Size([64, 128])
        """
        coefficients, vectors = self._combination(batch)
        check_index("neuron", start, coefficients.shape[1])
        check_index("neuron", stop - 1, coefficients.shape[1])
        with self._own_precision():
            return einsum(coefficients[:, start:stop], vectors, "pos n, pos d_model -> n d_model")

    def neuron_norms(self, batch: int | None = None) -> Float[Tensor, "d_hidden"]:
        """Length of each neuron of the gradient.

        The paper sorts neurons by it (appendix B, figures 8 to 10). Computed in float64, without
        the `d_in x d_out` matrix.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            `||neuron(j)||_2` at `j`; 0 where no position has a coefficient.

        Raises:
            InputError: If heads, or experts, have factors of their own.

        Examples:
            >>> norms = gradient.neuron_norms()
            >>> longest = int(norms.argmax())
            >>> torch.isclose(norms[longest].float(), gradient.neuron(longest).norm()).item()
            True
        """
        neurons, _ = self._in_span(batch)
        norms: Tensor = torch.linalg.vector_norm(neurons, dim=0)
        return norms

    def neuron_similarity(self, batch: int | None = None) -> Float[Tensor, "d_hidden n"]:
        """Cosine between each neuron of the gradient and each vector that spans it.

        How much a neuron of the gradient is one of the prompt's own `x_i` or `delta_i` (paper,
        appendix B, figures 8 to 10). Computed in float64, without the `d_in x d_out` matrix.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            The cosine of `neuron(j)` and the spanning vector of position `i` at `[j, i]`; NaN where
            one of the two is zero, and has no direction.

        Raises:
            InputError: If heads, or experts, have factors of their own.

        Examples:
            >>> similarity = gradient.neuron_similarity()
            >>> similarity.shape  # [d_hidden, n]
            torch.Size([512, 6])
            >>> longest = gradient.neuron_norms().argmax()
            >>> capture.str_tokens[0][int(similarity[longest].argmax())]
            ' for'
        """
        neurons, vectors = (
            part / torch.linalg.vector_norm(part, dim=0) for part in self._in_span(batch)
        )
        cosines: Tensor = einsum(neurons, vectors, "span d_hidden, span pos -> d_hidden pos")
        return cosines.clamp(-1, 1)  # rounding alone would leave the interval

    def _in_span(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "span d_hidden"], Float[Tensor, "span n"]]:
        """Neurons and spanning vectors in an orthonormal basis of the span, which keeps angles.

        With the spanning vectors as columns, `S^T = Q R`, vector `i` is column `i` of `R`, and a
        neuron of coefficients `c` is `R c`. The Gram matrix `R^T R` would give the same numbers
        with half the digits where the terms of a neuron cancel.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            Neurons and spanning vectors, as columns.
        """
        coefficients, vectors = self._combination(batch)
        basis = torch.linalg.qr(vectors.double().T, mode="r").R
        return basis @ coefficients.double(), basis

    def singular_values(self, batch: int | None = None) -> Float[Tensor, "rank_bound"]:
        """Singular values of one prompt's gradient, largest first, computed in float64.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            The `min(n, d_in, d_out)` values that can differ from zero. Heads lie side by side in
            the side that they divide.

        Examples:
            >>> values = gradient.singular_values()
            >>> len(values), bool(values[0] > 5 * values[1])  # nearly one outer product
            (6, True)
        """
        core_in, core_out = self._cores(batch)
        values: Tensor = torch.linalg.svdvals(core_in @ core_out.T)
        return values

    def spectra(
        self, batch: int | None = None
    ) -> tuple[
        Float[Tensor, "rank_bound"], Float[Tensor, "input_bound"], Float[Tensor, "vjp_bound"]
    ]:
        """Singular values of one prompt's gradient, and of its inputs and VJPs by themselves.

        Where the gradient's rank is below the number of positions that add something, those of the
        factors say which side has linearly dependent vectors (lemma 4.1).

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            As `singular_values`, and those of `X` and of `Delta`, each the largest first.

        Examples:
            >>> of_last_layer = capture["W_out", 7].spectra()
            >>> [int((values > 1e-6 * values[0]).sum()) for values in of_last_layer]  # three ranks
            [1, 6, 1]
        """
        core_in, core_out = self._cores(batch)
        gradient, inputs, vjps = map(
            torch.linalg.svdvals, (core_in @ core_out.T, core_in, core_out)
        )
        return gradient, inputs, vjps

    def _cores(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "input_bound n"], Float[Tensor, "vjp_bound n"]]:
        """`R_x` and `R_d` of the QR factorisations `X^T = Q_x R_x` and `Delta^T = Q_d R_d`.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            Both, at most `n x n` each. They have the factors' singular values, and `R_x R_d^T` the
            gradient's.
        """
        core_in, core_out = (
            torch.linalg.qr(factor.double().T, mode="r").R for factor in self._joined(batch)
        )
        return core_in, core_out

    def rank(self, batch: int | None = None, rtol: float | None = None) -> int:
        """Rank of one prompt's gradient.

        Args:
            batch: Which prompt; may be left out where there is one.
            rtol: Singular values up to this part of the largest one count as zero. By default `n`
                times the `eps` of the factors' dtype: what is smaller cannot be told from the
                rounding of the backward pass. Give a larger one for a model in half precision.

        Returns:
            The number of singular values above that.

        Examples:
            >>> capture["W_out", 6].rank(), capture["W_out", 7].rank()  # the last layer has rank 1
            (6, 1)
        """
        values = self.singular_values(batch)
        return numerical_rank(values, self.rounding(batch) if rtol is None else rtol)

    def rounding(self, batch: int | None = None) -> float:
        """`n` times the `eps` of the factors' dtype, `rank`'s tolerance unless it is given one.

        Args:
            batch: Which prompt; may be left out where there is one.

        Returns:
            The tolerance.

        Examples:
            >>> gradient.rounding() == 6 * torch.finfo(torch.float32).eps
            True
        """
        return int(self.mask[self._prompt(batch)].sum()) * torch.finfo(self.vjps.dtype).eps

    def _own_precision(self) -> torch.autocast:
        """Keep a caller's autocast from rounding."""
        return torch.autocast(self.vjps.device.type, enabled=False)

    def _combination(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "n d_hidden"], Float[Tensor, "n d_model"]]:
        """The coefficients of each neuron, and the vectors that they combine (equations 9, 10)."""
        inputs, vjps = self._joined(batch)
        return (vjps, inputs) if self.reads_residual else (inputs, vjps)

    @property
    def has_joint_factors(self) -> bool:
        """Whether one pair of factors holds all heads; not so for experts, or heads that differ."""
        return self.experts is None and self.inputs.ndim + self.vjps.ndim < 8

    @property
    def _part(self) -> str:
        return "head" if self.experts is None else "expert"

    def _real(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "n *head d_in"], Float[Tensor, "n *head_ d_out"]]:
        prompt = self._prompt(batch)
        real = self.mask[prompt]
        inputs, vjps = self.inputs[prompt, real], self.vjps[prompt, real]
        return at_least_float32(inputs), at_least_float32(vjps)

    def _prompt(self, batch: int | None) -> int:
        if batch is None and len(self.mask) > 1:
            raise InputError(
                f"batch is None, and there are {len(self.mask)} prompts, each with a gradient of "
                "its own; say which, as in gradient.dense(batch=0). That of their summed loss is "
                "sum(gradient.dense(batch) for batch in range(len(gradient.mask)))"
            )
        prompt = 0 if batch is None else batch
        check_index("prompt", prompt, len(self.mask))
        return prompt

    def _joined(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "n d_in"], Float[Tensor, "n d_out"]]:
        """Both factors, with heads side by side."""
        if not self.has_joint_factors:
            raise InputError(
                f"each {self._part} of {self.matrix} in layer {self.layer} has factors of its own; "
                f"ask for one of them with .{self._part}(index)"
            )
        inputs, vjps = self._real(batch)
        return inputs.flatten(1), vjps.flatten(1)


def numerical_rank(singular_values: Float[Tensor, "rank_bound"], rtol: float) -> int:
    """The number of singular values above `rtol` times the largest; 0 if there are none."""
    if not len(singular_values):
        return 0
    return int((singular_values > rtol * singular_values.max()).sum())


def _norms(factor: Float[Tensor, "batch pos *parts d"]) -> Float[Tensor, "batch pos"]:
    norms: Tensor = torch.linalg.vector_norm(at_least_float32(factor.flatten(2)), dim=-1)
    return norms
