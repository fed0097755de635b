"""The drop-ins, each with the arguments of its torch class."""

from typing import Any, Unpack

import torch
from torch import Tensor

from deltaserve.torch._options import RemoteOptions
from deltaserve.torch._remote import RemoteOptimizer


class RemoteAdadelta(RemoteOptimizer):
    """A drop-in for `torch.optim.Adadelta` (Zeiler, 2012, arXiv:1212.5701) whose weights and state are on a server.

    With g as the gradient, s (`square_avg`) and dx (`acc_delta`) as the state and x as the weights:

        s  = rho s + (1 - rho) g^2
        g' = sqrt(dx + eps) / sqrt(s + eps) g
        dx = rho dx + (1 - rho) g'^2
        x  = x - lr g'

    Args:
        params: See `RemoteOptimizer`, as for `target`, `model` and `options`.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: Factor of the update, in [0, 2**38].
        rho: Decay of both averages, in [0, 1].
        eps: Added to both averages before their square root, in [2**-126, 2**64].
        weight_decay: L2 penalty, >= 0.
        foreach: No effect.
        capturable: Must be False.
        maximize: Ascend instead of descend.
        differentiable: Must be False.
        options: The keyword arguments in `RemoteOptions`.

    Example:
        >>> import deltaserve_server
        >>> net = torch.nn.Linear(2, 1)
        >>> with deltaserve_server.LocalServer() as server:
        ...     with RemoteAdadelta(net.parameters(), server.target, model="line", lr=0.5) as optimizer:
        ...         for step in range(3):
        ...             optimizer.zero_grad()
        ...             net(torch.ones(1, 2)).square().sum().backward()
        ...             optimizer.step()
        ...         optimizer.version
        3
    """

    _torch_class = torch.optim.Adadelta

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1.0,
        rho: float = 0.9,
        eps: float = 1e-6,
        weight_decay: float = 0,
        foreach: bool | None = None,
        capturable: bool = False,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[RemoteOptions],
    ) -> None:
        arguments = {
            "lr": lr,
            "rho": rho,
            "eps": eps,
            "weight_decay": weight_decay,
            "foreach": foreach,
            "capturable": capturable,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, target, arguments, model=model, **options)


class RemoteSGD(RemoteOptimizer):
    """A drop-in for `torch.optim.SGD` whose weights and state are on a server.

    With g as the gradient, b (`momentum_buffer`) as the state and x as the weights:

        b = momentum b + (1 - dampening) g, and b = g in the first update
        x = x - lr b, and with `nesterov` x - lr (g + momentum b)

    Without momentum there is no state, and x = x - lr g.

    Args:
        params: See `RemoteOptimizer`, as for `target`, `model` and `options`.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: Learning rate, >= 0.
        momentum: Decay of the buffer, >= 0. Whether it is 0 is fixed when the model is created.
        dampening: How much less than whole the gradient enters the buffer, in [0, 1].
        weight_decay: L2 penalty, >= 0.
        nesterov: Use Nesterov momentum, which needs momentum > 0 and dampening = 0; fixed when the model is created.
        maximize: Ascend instead of descend.
        foreach: No effect.
        differentiable: Must be False.
        fused: No effect.
        options: The keyword arguments in `RemoteOptions`.

    Example:
        >>> import deltaserve_server
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with deltaserve_server.LocalServer() as server:
        ...     with RemoteSGD([weight], server.target, model="line", lr=0.5, momentum=0.5) as optimizer:
        ...         for step in range(2):
        ...             weight.grad = torch.ones(1)
        ...             optimizer.step()
        >>> weight.item()
        -0.25
    """

    _torch_class = torch.optim.SGD

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[RemoteOptions],
    ) -> None:
        arguments = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
            "maximize": maximize,
            "foreach": foreach,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, target, arguments, model=model, **options)


class RemoteAdagrad(RemoteOptimizer):
    """A drop-in for `torch.optim.Adagrad` (Duchi et al., 2011, JMLR 12) whose weights and state are on a server.

    With g as the gradient, s (`sum`) as the state, x as the weights and t as the number of updates:

        s = s + g^2
        x = x - lr / (1 + (t - 1) lr_decay) g / (sqrt(s) + eps)

    Args:
        params: See `RemoteOptimizer`, as for `target`, `model` and `options`.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: Learning rate, >= 0.
        lr_decay: Decay of the learning rate with the number of updates, >= 0.
        weight_decay: L2 penalty, >= 0.
        initial_accumulator_value: The sum before the first update, >= 0. As in torch, it holds for all groups.
        eps: Added to the root, > 0.
        foreach: No effect.
        maximize: Ascend instead of descend.
        differentiable: Must be False.
        fused: No effect.
        options: The keyword arguments in `RemoteOptions`.

    Example:
        >>> import deltaserve_server
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with deltaserve_server.LocalServer() as server:
        ...     with RemoteAdagrad([weight], server.target, model="line", lr=0.5) as optimizer:
        ...         weight.grad = torch.full((1,), 4.0)
        ...         optimizer.step()
        >>> weight.item()
        0.5
    """

    _torch_class = torch.optim.Adagrad

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[RemoteOptions],
    ) -> None:
        arguments = {
            "lr": lr,
            "lr_decay": lr_decay,
            "weight_decay": weight_decay,
            "initial_accumulator_value": initial_accumulator_value,
            "eps": eps,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, target, arguments, model=model, **options)


class RemoteRMSprop(RemoteOptimizer):
    """A drop-in for `torch.optim.RMSprop` (Tieleman and Hinton, 2012) whose weights and state are on a server.

    With g as the gradient, s (`square_avg`), a (`grad_avg`) and b (`momentum_buffer`) as the state and x as the
    weights:

        s = alpha s + (1 - alpha) g^2
        a = alpha a + (1 - alpha) g, only if `centered`
        v = s, and max(s - a^2, 0) if `centered`
        b = momentum b + g / (sqrt(v) + eps), only with momentum
        x = x - lr b, and without momentum x - lr g / (sqrt(v) + eps)

    torch lacks the max(): where rounding makes its variance negative, its weight becomes NaN.

    Args:
        params: See `RemoteOptimizer`, as for `target`, `model` and `options`.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: Learning rate, >= 0.
        alpha: Decay of the averages, in [0, 1].
        eps: Added to the root, > 0.
        weight_decay: L2 penalty, >= 0.
        momentum: Decay of the buffer, >= 0. Whether it is 0 is fixed when the model is created.
        centered: Divide by the standard deviation of the gradient; fixed when the model is created.
        capturable: Must be False.
        foreach: No effect.
        maximize: Ascend instead of descend.
        differentiable: Must be False.
        options: The keyword arguments in `RemoteOptions`.

    Example:
        >>> import deltaserve_server
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with deltaserve_server.LocalServer() as server:
        ...     with RemoteRMSprop([weight], server.target, model="line", lr=0.25, alpha=0.75) as optimizer:
        ...         weight.grad = torch.full((1,), 8.0)
        ...         optimizer.step()
        >>> weight.item()
        0.5
    """

    _torch_class = torch.optim.RMSprop

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **options: Unpack[RemoteOptions],
    ) -> None:
        arguments = {
            "lr": lr,
            "alpha": alpha,
            "eps": eps,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "centered": centered,
            "capturable": capturable,
            "foreach": foreach,
            "maximize": maximize,
            "differentiable": differentiable,
        }
        super().__init__(params, target, arguments, model=model, **options)


class RemoteAdam(RemoteOptimizer):
    """A drop-in for `torch.optim.Adam` (Kingma and Ba, 2014, arXiv:1412.6980) whose weights and state are on a server.

    With g as the gradient, m (`exp_avg`), v (`exp_avg_sq`) and u (`max_exp_avg_sq`) as the state, x as the weights and
    t as the number of updates:

        m = beta1 m + (1 - beta1) g
        v = beta2 v + (1 - beta2) g^2
        u = v, and max(u, v) with `amsgrad` (Reddi et al., 2018, arXiv:1904.09237)
        x = x - lr (m / (1 - beta1^t)) / (sqrt(u / (1 - beta2^t)) + eps)

    Args:
        params: See `RemoteOptimizer`, as for `target`, `model` and `options`.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: Learning rate, >= 0.
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the root, > 0.
        weight_decay: L2 penalty, >= 0.
        amsgrad: Use the largest second moment so far; fixed when the model is created.
        foreach: No effect.
        maximize: Ascend instead of descend.
        capturable: Must be False.
        differentiable: Must be False.
        fused: No effect.
        decoupled_weight_decay: Must be False; `RemoteAdamW` is the optimizer with decoupled weight decay.
        options: The keyword arguments in `RemoteOptions`.

    Example:
        >>> import deltaserve_server
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with deltaserve_server.LocalServer() as server:
        ...     with RemoteAdam([weight], server.target, model="line", lr=0.5) as optimizer:
        ...         weight.grad = torch.full((1,), 8.0)
        ...         optimizer.step()
        >>> round(weight.item(), 6)
        0.5
    """

    _torch_class = torch.optim.Adam

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **options: Unpack[RemoteOptions],
    ) -> None:
        if decoupled_weight_decay:
            raise ValueError("decoupled_weight_decay: expected False, got True; use RemoteAdamW instead")
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "foreach": foreach,
            "maximize": maximize,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, target, arguments, model=model, **options)


class RemoteAdamW(RemoteOptimizer):
    """A drop-in for `torch.optim.AdamW` whose weights and state are on a server.

    It is Adam with decoupled weight decay (Loshchilov and Hutter, 2019, arXiv:1711.05101): before an update as that of
    `RemoteAdam`, x = x (1 - lr weight_decay).

    Args:
        params: See `RemoteOptimizer`, as for `target`, `model` and `options`.
        target: HOST:PORT of the server, or unix:PATH.
        model: The model's name on the server.
        lr: Learning rate, >= 0.
        betas: Decays of the two moments, in [0, 1).
        eps: Added to the root, > 0.
        weight_decay: Weight decay, >= 0.
        amsgrad: Use the largest second moment so far; fixed when the model is created.
        maximize: Ascend instead of descend.
        foreach: No effect.
        capturable: Must be False.
        differentiable: Must be False.
        fused: No effect.
        options: The keyword arguments in `RemoteOptions`.

    Example:
        >>> import deltaserve_server
        >>> weight = torch.nn.Parameter(torch.tensor([1.0]))
        >>> with deltaserve_server.LocalServer() as server:
        ...     with RemoteAdamW([weight], server.target, model="line", lr=0.5, weight_decay=0.5) as optimizer:
        ...         weight.grad = torch.full((1,), 8.0)
        ...         optimizer.step()
        >>> round(weight.item(), 6)
        0.25
    """

    _torch_class = torch.optim.AdamW

    def __init__(
        self,
        params: Any,
        target: str,
        *,
        model: str,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: Unpack[RemoteOptions],
    ) -> None:
        arguments = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
        }
        super().__init__(params, target, arguments, model=model, **options)
