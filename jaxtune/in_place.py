"""Gradients whose kept arrays are made where they stay.

`jax.lax.scan` makes what a turn gives for a stack and then copies it there. Here whatever reads such an array within
the turn reads it out of the stack, so that XLA lets the product or the kernel that makes it write into the stack.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var
from jax.extend.core.primitives import name_p, reduce_precision_p, scan_p

Bind = Callable[[JaxprEqn, list], list]  # an equation and its inputs -> its outputs


def value_and_grad(function: Callable, **how: Any) -> Callable:
    """`jax.value_and_grad`, with what its loops over layers keep made in place; not to be differentiated again."""
    graded = jax.value_and_grad(function, **how)

    def run(*args):
        traced, shape = jax.make_jaxpr(graded, return_shape=True)(*args)
        leaves = _evaluated(traced, jax.tree.leaves(args), _in_place)
        return jax.tree.unflatten(jax.tree.structure(shape), leaves)

    return run


def _evaluated(jaxpr: Jaxpr, inputs: list, bind: Bind) -> list:
    """The outputs of a jaxpr."""
    variables, values = [*jaxpr.constvars, *jaxpr.invars], [*jaxpr.consts, *inputs]
    known: dict[Var, Any] = dict(zip(variables, values, strict=True))
    read = lambda v: v.val if isinstance(v, Literal) else known[v]  # noqa: E731
    for equation in jaxpr.eqns:
        known |= zip(equation.outvars, bind(equation, [*map(read, equation.invars)]), strict=True)
    return [*map(read, jaxpr.outvars)]


def _as_it_stands(equation: JaxprEqn, inputs: list) -> list:
    """Under its own named scopes."""
    wanted = {v: value for v, value in zip(equation.invars, inputs, strict=True) if isinstance(v, Var)}
    one = Jaxpr((), [*wanted], equation.outvars, [equation], equation.effects)
    return jax.core.eval_jaxpr(one, (), *wanted.values())


def _in_place(equation: JaxprEqn, inputs: list) -> list:
    """A scan over layers that keep something, in another form; any other equation as it stands.

    What is as large as what the layers hand on is made in place. Of other arrays with a name, those that are also read
    stand behind a barrier: without it XLA fuses the product that makes one with its copy, and runs it again for whoever
    reads it.
    """
    body = equation.params["jaxpr"] if equation.primitive is scan_p else None
    if body is None or not any(each.primitive is name_p for each in body.eqns):
        return _as_it_stands(equation, inputs)
    length, reverse = equation.params["length"], equation.params["reverse"]
    consts, carry, xs = (list(part) for part in equation.params["ft_in"].update(inputs).unpack())
    carried, stacked = body.outvars[: len(carry)], body.outvars[len(carry) :]
    made = {v: each for each in body.eqns for v in each.outvars}
    read = {v for v in (*carried, *(v for each in body.eqns for v in each.invars)) if isinstance(v, Var)}
    large = max((v.aval.size for v in carried), default=math.inf)
    kept = {v: i for i, v in enumerate(stacked) if isinstance(v, Var) and v in made}
    places = {v: i for v, i in kept.items() if v in read and v.aval.size >= large}
    free = {*places, *(v for v in kept if v not in read)}
    # of a name that is read too, jax.checkpoint has stacked a rounded copy
    free |= {made[v].invars[0] for v in free if made[v].primitive is reduce_precision_p}

    def turn(state, slices):
        number, carry, stacks = state
        at, stacks = length - 1 - number if reverse else number, dict(stacks)

        def bind(each, inputs):
            found = _as_it_stands(each, inputs)
            for i, v in enumerate(each.outvars):
                if v in places:
                    stack = jax.lax.dynamic_update_index_in_dim(stacks[places[v]], found[i], at, 0)
                    stacks[places[v]] = stack
                    found[i] = jax.lax.dynamic_index_in_dim(stack, at, 0, keepdims=False)
                elif each.primitive is name_p and v not in free:
                    found[i] = jax.lax.optimization_barrier(found[i])
            return found

        values = _evaluated(body, [*consts, *carry, *slices], bind)
        rest = [y for i, y in enumerate(values[len(carry) :]) if i not in stacks]
        return (number + 1, values[: len(carry)], stacks), rest

    stacks = {i: jnp.zeros((length, *v.aval.shape), v.aval.dtype) for v, i in places.items()}
    (_, carry, stacks), rest = jax.lax.scan(turn, (jnp.int32(0), carry, stacks), xs, length, reverse)
    others = iter(rest)
    return [*carry, *(stacks[i] if i in stacks else next(others) for i in range(len(stacked)))]
