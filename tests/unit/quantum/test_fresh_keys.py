"""No two releases share noise: not after a fork, not of a copy, not of a key that is loaded again."""

import copy
import os

import numpy as np
import pytest

from dp_flash_attention.core.privacy import NeighboringRelation, PrivacyBudget, Sensitivity
from dp_flash_attention.noise import SecretKey, TestKey
from dp_flash_attention.quantum.fresh_keys import fresh_subkey
from dp_flash_attention.quantum.lattice_gaussian import LatticeGaussian
from dp_flash_attention.quantum.layered_noise import LayeredNoise
from dp_flash_attention.quantum.post_quantum_gaussian import PostQuantumGaussian

BUDGET = PrivacyBudget(epsilon=1.0, delta=1e-6)
MOVED = Sensitivity(l2=50.0, neighboring_relation=NeighboringRelation.ADD_OR_REMOVE_ONE)
# Eight numbers of standard deviation above 200: two independent releases agree with probability below 1e-16.
MECHANISMS = {
    "integers": lambda: PostQuantumGaussian(),
    "lattice": lambda: LatticeGaussian([[2, 0], [1, 2]]),
    "layered": lambda: LayeredNoise(num_parties=2, num_honest=1),
}


def drawn(mechanism):
    shape = (2, 8) if isinstance(mechanism, LayeredNoise) else (8,)
    return repr(mechanism.release(np.zeros(shape), MOVED, BUDGET).value.tolist())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", MECHANISMS)
def test_a_forked_process_draws_other_noise(name):
    mechanism = MECHANISMS[name]()
    drawn(mechanism)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(write, drawn(mechanism).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        theirs = pipe.read()
    os.waitpid(child, 0)
    assert theirs
    assert theirs != drawn(mechanism)


@pytest.mark.parametrize("name", MECHANISMS)
def test_a_copy_draws_other_noise(name):
    mechanism = MECHANISMS[name]()
    assert drawn(copy.copy(mechanism)) != drawn(mechanism)


def test_a_subkey_is_fresh_unless_it_is_for_tests():
    key = SecretKey.from_os()
    assert fresh_subkey(key, "a") != fresh_subkey(key, "a")
    assert fresh_subkey(TestKey("a"), "a").export() == fresh_subkey(TestKey("a"), "a").export()
