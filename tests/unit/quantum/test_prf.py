import hashlib

from dp_flash_attention.quantum.prf import keyed_shake256


def test_the_layout_is_the_one_described():
    def framed(part):
        return len(part).to_bytes(8, "big") + part

    head = framed(b"d") + framed(b"k" * 32)
    block = head + bytes(136 - len(head))
    message = block + framed(b"one") + framed(b"") + (2).to_bytes(8, "big") + (8 * 20).to_bytes(8, "big")
    assert keyed_shake256(b"k" * 32, b"one", b"", domain=b"d", num_bytes=20) == hashlib.shake_256(
        message
    ).digest(20)


def test_every_part_of_the_input_counts():
    def at(key=b"k" * 32, fields=(b"ab", b"c"), domain=b"d", num_bytes=32):
        return keyed_shake256(key, *fields, domain=domain, num_bytes=num_bytes)

    others = [
        at(key=b"l" * 32),
        at(key=b"k" * 33),
        at(fields=(b"a", b"bc")),
        at(fields=(b"abc",)),
        at(fields=(b"ab", b"c", b"")),
        at(domain=b"e"),
        at(num_bytes=64)[:32],
    ]
    assert len({at(), *others}) == 1 + len(others)
