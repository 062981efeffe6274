"""Gradients of weight matrices, kept as their two factors.

For `y = x @ W + b` and a loss from one forward pass over `n` positions,

    dL/dW = sum_i x_i^T delta_i = X^T Delta,   X: [n, d_in],   Delta: [n, d_out]

where `delta_i = dL/dy_i` is the vector-Jacobian product (VJP) at position `i` (paper, equation 8).
The rank is at most `n` (lemma 4.1), so everything about the gradient follows from the factors.
"""

from __future__ import annotations

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from backward_lens_tl._checks import check_index, checked_count
from backward_lens_tl.capture.directions import (
    PrincipalDirections,
    numerical_rank,
    principal_directions,
)
from backward_lens_tl.capture.factors import Factors


class MatrixGradient(Factors):
    """The gradient of one weight matrix for each prompt of a batch, as factors.

    Signs are those of the raw gradient: gradient descent *subtracts* it. Factors are zero at
    padding.

    A matrix with heads has an axis for them in the factor that is divided: `vjps` of `W_Q`, `W_K`
    and `W_V` (key-value heads for the last two), `inputs` of `W_O`. The other factor has it too if
    heads differ there, as under a patch of `hook_q_input` or `hook_result`. A mixture of experts
    has an axis for a token's slots instead, and `experts` says which expert each slot is.

    Attributes:
        matrix: TransformerLens's name of the matrix.
        layer: The layer, from 0.
        inputs: `x_i`, the matrix's inputs.
        vjps: `delta_i`, the gradient of the prompt's loss at the matrix's own output.
        mask: False at padding, and in one expert's gradient where a token was not routed to it.
        experts: The expert of each slot, -1 at padding; `None` without experts.
        n_experts: Number of experts.
        joined_vjps: The gradient where the matrix's output is added to the residual stream, if it
            differs from `vjps`; `resid_vjps` returns it in all cases.
        input_hook: TransformerLens's hook point that shows `x_i`, if there is one.
        output_hook: TransformerLens's hook point that shows the output, or the output after a norm
            or scale on its way to the residual stream.

    Examples:
        >>> import backward_lens_tl as blt
        >>> model = blt.load_facts_model()
        >>> loss = blt.target_nll(" Paris")
        >>> capture = blt.capture_gradients(model, "Lionel Messi plays for", loss)
        >>> gradient = capture["W_out", 6]
        >>> gradient.inputs.shape, gradient.vjps.shape  # [batch, pos, d_in], [batch, pos, d_out]
        (torch.Size([1, 6, 512]), torch.Size([1, 6, 128]))
        >>> gradient.rank()  # the prompt has 6 tokens
        6
    """

    def factored(self, batch: int | None = None) -> FactoredMatrix:
        """The gradient of one prompt as TransformerLens's `FactoredMatrix`.

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            `A @ B` with `A = X^T`, `[d_in, n]`, and `B = Delta`, `[n, d_out]`; `n` is the
            prompt's own length. Heads are concatenated.

        Examples:
            >>> factored = gradient.factored()
            >>> factored.A.shape, factored.B.shape  # X^T [d_in, n], Delta [n, d_out]
            (torch.Size([512, 6]), torch.Size([6, 128]))
        """
        inputs, vjps = self._joined(batch)
        return FactoredMatrix(inputs.T, vjps)

    def dense(self, batch: int | None = None) -> Float[Tensor, "*head d_in d_out"]:
        """The gradient of one prompt as a matrix.

        The only method that allocates `d_in * d_out` numbers: 9.4 MB for an MLP matrix of GPT-2
        small in float32, 41 MB for GPT-2 XL.

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            `X^T Delta`, with a first axis for heads or experts if there are any.

        Examples:
            >>> gradient.dense().shape  # [d_in, d_out]
            torch.Size([512, 128])
            >>> inputs, vjps = gradient.inputs[0], gradient.vjps[0]
            >>> torch.allclose(gradient.dense(), inputs.T @ vjps)
            True
        """
        if self.n_experts is not None:
            return torch.stack([self.expert(each).dense(batch) for each in range(self.n_experts)])
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
            batch: Which prompt; optional if there is only one.

        Returns:
            `sum_i delta_i`, with a first axis for heads if `vjps` has one, or for experts. For a
            layer without a bias, the gradient of a bias of zero.

        Raises:
            InputError: If the heads of `W_O`, which share one bias, write different vectors.

        Examples:
            >>> torch.allclose(gradient.bias(), gradient.vjps[0].sum(0))
            True
        """
        if self.n_experts is not None:
            return torch.stack([self.expert(index).bias(batch) for index in range(self.n_experts)])
        if not self.reads_residual:
            self._joined(batch)  # raises if heads, which share one bias, differ
        return self._real(batch)[1].sum(0)

    def neuron(self, index: int, batch: int | None = None) -> Float[Tensor, "d_model"]:
        """One neuron of the gradient: the vector of width `d_model` that one hidden unit receives.

        Args:
            index: The hidden unit, from 0: of the MLP, or of the concatenated heads.
            batch: Which prompt; optional if there is only one.

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
        """A block of neurons of the gradient; all of them together are the `d_in x d_out` matrix.

        Args:
            start: The first hidden unit, from 0.
            stop: The hidden unit after the last one.
            batch: Which prompt; optional if there is only one.

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
        """Norm of each neuron of the gradient.

        The paper sorts neurons by it (appendix B, figures 8 to 10). Computed in float64, without
        the `d_in x d_out` matrix.

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            `||neuron(j)||_2` at `j`.

        Raises:
            InputError: If heads, or experts, have their own factors.

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
        """Cosine between each neuron of the gradient and each vector of the spanning set.

        How close a neuron is to one of the prompt's own `x_i` or `delta_i` (paper, appendix B,
        figures 8 to 10). Computed in float64, without the `d_in x d_out` matrix.

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            The cosine of `neuron(j)` and the spanning vector of position `i` at `[j, i]`; NaN if
            one of the two is zero.

        Raises:
            InputError: If heads, or experts, have their own factors.

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
        return cosines.clamp(-1, 1)  # against rounding

    def _in_span(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "span d_hidden"], Float[Tensor, "span n"]]:
        """Neurons and spanning vectors as columns, in an orthonormal basis of the span."""
        # With the QR factorisation `S^T = Q R` of the spanning vectors, vector `i` is column `i` of
        # `R`, and a neuron with coefficients `c` is `R c`. The Gram matrix `R^T R` would give the
        # same numbers with half the digits where the terms of a neuron cancel.
        coefficients, vectors = self._combination(batch)
        basis = torch.linalg.qr(vectors.double().T, mode="r").R
        return basis @ coefficients.double(), basis

    def singular_values(self, batch: int | None = None) -> Float[Tensor, "rank_bound"]:
        """Singular values of one prompt's gradient, largest first, computed in float64.

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            The `min(n, d_in, d_out)` values that can differ from zero. Heads are concatenated.

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
        """Singular values of one prompt's gradient, and of its inputs and VJPs.

        If the gradient's rank is below the number of positions that add something, those of the
        factors say which one has linearly dependent vectors (lemma 4.1).

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            `singular_values`, and those of `X` and of `Delta`, each the largest first.

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
        """`R_x` and `R_d` of the QR factorisations `X^T = Q_x R_x` and `Delta^T = Q_d R_d`."""
        # Both are at most `n x n`. They have the factors' singular values, and `R_x R_d^T` the
        # gradient's.
        core_in, core_out = (
            torch.linalg.qr(factor.double().T, mode="r").R for factor in self._joined(batch)
        )
        return core_in, core_out

    def principal_directions(self, k: int = 10, batch: int | None = None) -> PrincipalDirections:
        """The largest singular vectors of one prompt's gradient, computed in float64.

        The matrix that is decomposed has at most `n` rows and columns. For the gradient of a batch,
        `gradient.total().principal_directions(k)`, `n` is the number of its positions.

        Args:
            k: Number of directions; fewer if the factors, as they are kept, have a gradient of a
                lower rank.
            batch: Which prompt; optional if there is only one.

        Returns:
            The directions, largest first, and the positions that contribute to them. Heads are
            concatenated. Values below `rounding()` times the largest one, and their directions,
            cannot be distinguished from the rounding of the backward pass.

        Raises:
            InputError: If heads, or experts, have their own factors, or `k` is not positive.

        Examples:
            >>> main = gradient.principal_directions(3)
            >>> main.inputs.shape, main.vjps.shape, main.contributions.shape
            (torch.Size([3, 512]), torch.Size([3, 128]), torch.Size([3, 6]))
            >>> torch.allclose(main.values, gradient.singular_values()[:3])
            True
        """
        k = checked_count("k", k)
        return principal_directions(*self._joined(batch), k, self.reads_residual)

    def rank(self, batch: int | None = None, rtol: float | None = None) -> int:
        """Rank of one prompt's gradient.

        Args:
            batch: Which prompt; optional if there is only one.
            rtol: Singular values up to this fraction of the largest one count as zero. By default
                `n` times the `eps` of the factors' dtype: smaller ones cannot be distinguished from
                the rounding of the backward pass. Pass a larger one for a model in half precision.

        Returns:
            The number of singular values above it.

        Examples:
            >>> capture["W_out", 6].rank(), capture["W_out", 7].rank()  # the last layer has rank 1
            (6, 1)
        """
        values = self.singular_values(batch)
        return numerical_rank(values, self.rounding(batch) if rtol is None else rtol)

    def rounding(self, batch: int | None = None) -> float:
        """`n` times the `eps` of the factors' dtype, the default tolerance of `rank`.

        Args:
            batch: Which prompt; optional if there is only one.

        Returns:
            The tolerance.

        Examples:
            >>> gradient.rounding() == 6 * torch.finfo(torch.float32).eps
            True
        """
        return int(self.mask[self._prompt(batch)].sum()) * torch.finfo(self.vjps.dtype).eps

    def _own_precision(self) -> torch.autocast:
        """Disable a caller's autocast."""
        return torch.autocast(self.vjps.device.type, enabled=False)

    def _combination(
        self, batch: int | None
    ) -> tuple[Float[Tensor, "n d_hidden"], Float[Tensor, "n d_model"]]:
        """Coefficients of each neuron, and the vectors that they combine (equations 9 and 10)."""
        inputs, vjps = self._joined(batch)
        return (vjps, inputs) if self.reads_residual else (inputs, vjps)
