# Sends an NBD server what no decent client would, with libnbd's checks off.
# SOCKET SIZE, with exports `disk` (the default, of SIZE bytes, all zeros) and `view` (read-only).
# Each case says what the protocol (doc/proto.md) demands; the exit status tells of the first that
# is answered otherwise.
import errno
import sys

import nbd

path, size = sys.argv[1], int(sys.argv[2])
PAGE = 4096
MAX = 32 << 20
UNKNOWN_FLAG = 1 << 9
ignore = lambda *a: 0  # noqa: E731


def connect(structured=True, export="disk", contexts=(nbd.CONTEXT_BASE_ALLOCATION,)):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.set_export_name(export)
    for context in contexts:
        h.add_meta_context(context)
    h.connect_unix(path)
    return h


def fails(demand, want, call, *args):
    what = f"{demand}: {call.__name__}{args[1:] if call.__name__ == 'pwrite' else args}"
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == want, f"{what} gave {e.errnum}, wanted {want}"
        return
    raise AssertionError(f"{what} succeeded")


def alive(h):
    h.pwrite(b"\x5a" * PAGE, size - PAGE)
    assert h.pread(PAGE, size - PAGE) == b"\x5a" * PAGE
    assert h.pread(1, size - 1) == b"\x5a"
    h.pwrite(bytes(PAGE), size - PAGE, nbd.CMD_FLAG_FUA)


def beyond_the_end(h):
    demand = "beyond the size: EINVAL for what reads or trims"
    for length, offset in [
        (PAGE, size), (PAGE, size - 1), (PAGE, 2**64 - PAGE), (1, 2**63), (1, size), (PAGE, 2**64 - 1),
    ]:
        fails(demand, errno.EINVAL, h.pread, length, offset)
        fails(demand, errno.EINVAL, h.trim, length, offset)
        fails(demand, errno.EINVAL, h.cache, length, offset)
        demand_write = "beyond the size: ENOSPC for what writes"
        fails(demand_write, errno.ENOSPC, h.pwrite, bytearray(length), offset)
        fails(demand_write, errno.ENOSPC, h.zero, length, offset)
    fails("2^32 - 1 bytes from the last page", errno.ENOSPC, h.zero, 2**32 - 1, size - PAGE)
    fails("2^32 - 1 bytes from the last page", errno.EINVAL, h.trim, 2**32 - 1, size - PAGE)
    fails("a large write beyond the size", errno.ENOSPC, h.pwrite, bytearray(1 << 20), size)


def no_bytes(h):
    demand = "length 0 is unspecified, but no reason to disconnect; here EINVAL"
    fails(demand, errno.EINVAL, h.pread, 0, 0)
    fails(demand, errno.EINVAL, h.pwrite, bytearray(0), 0)
    fails(demand, errno.EINVAL, h.trim, 0, 0)
    fails(demand, errno.EINVAL, h.zero, 0, 0)
    fails(demand, errno.EINVAL, h.cache, 0, 0)


def unknown_flags(h):
    demand = "an unknown flag, or one of another command, is EINVAL"
    page = bytearray(PAGE)
    for flag in [UNKNOWN_FLAG, nbd.CMD_FLAG_NO_HOLE, nbd.CMD_FLAG_REQ_ONE, nbd.CMD_FLAG_FAST_ZERO]:
        fails(demand, errno.EINVAL, h.pread, PAGE, 0, flag)
        fails(demand, errno.EINVAL, h.pwrite, page, 0, flag)
        fails(demand, errno.EINVAL, h.trim, PAGE, 0, flag)
        fails(demand, errno.EINVAL, h.cache, PAGE, 0, flag)
        fails(demand, errno.EINVAL, h.flush, flag)
    for flag in [UNKNOWN_FLAG, nbd.CMD_FLAG_DF, nbd.CMD_FLAG_REQ_ONE]:
        fails(demand, errno.EINVAL, h.zero, PAGE, 0, flag)
    fails(demand, errno.EINVAL, h.pwrite, page, 0, nbd.CMD_FLAG_DF)
    # FUA must be accepted with every command once it was offered.
    h.pread(PAGE, 0, nbd.CMD_FLAG_FUA)
    h.cache(PAGE, 0, nbd.CMD_FLAG_FUA)
    h.flush(nbd.CMD_FLAG_FUA)
    h.trim(PAGE, 0, nbd.CMD_FLAG_FUA)
    h.zero(PAGE, 0, nbd.CMD_FLAG_FUA | nbd.CMD_FLAG_NO_HOLE)
    h.trim(PAGE, 0)


def too_large(h, structured):
    demand = "a read above the maximum payload: EOVERFLOW, where DF was not offered EINVAL"
    want = errno.EOVERFLOW if structured else errno.EINVAL
    fails(demand, want, h.pread, MAX + 1, 0)
    assert len(h.pread(MAX, 0)) == MAX
    h.cache(size, 0)  # no payload, no maximum


def dont_fragment(h, structured):
    if not structured:
        fails("DF without structured replies", errno.EINVAL, h.pread, PAGE, 0, nbd.CMD_FLAG_DF)
        return
    chunks = []
    h.pwrite(b"\x77" * PAGE, PAGE)
    buffer = h.pread_structured(
        4 * PAGE, 0, lambda data, at, kind, error: chunks.append(kind), nbd.CMD_FLAG_DF
    )
    assert chunks == [nbd.READ_DATA], "DF: data and a hole are one chunk of data"
    assert buffer == bytes(PAGE) + b"\x77" * PAGE + bytes(2 * PAGE)
    h.zero(PAGE, PAGE)


def block_status(h, structured):
    if not structured:
        demand = "BLOCK_STATUS without a context is EINVAL"
        fails(demand, errno.EINVAL, h.block_status, PAGE, 0, ignore)
        return
    extents = []
    h.block_status(size, 0, lambda context, at, entries, error: extents.extend(entries))
    assert sum(extents[::2]) == size, extents
    for length, offset in [(PAGE, size), (1, 2**63), (size, 1)]:
        fails("beyond the size: EINVAL", errno.EINVAL, h.block_status, length, offset, ignore)
    fails("length 0: EINVAL", errno.EINVAL, h.block_status, 0, 0, ignore)
    fails("unknown flag", errno.EINVAL, h.block_status, PAGE, 0, ignore, UNKNOWN_FLAG)
    one = []
    h.block_status(
        size - 7, 7, lambda context, at, entries, error: one.extend(entries), nbd.CMD_FLAG_REQ_ONE
    )
    assert len(one) == 2 and one[0] <= size - 7, one


def read_only():
    h = connect(export="view")
    assert h.is_read_only() and not h.can_fua() and not h.can_trim() and not h.can_zero()
    demand = "what writes to a read-only export is EPERM"
    for length in [1, PAGE, 1 << 20]:
        fails(demand, errno.EPERM, h.pwrite, bytearray(length), 0)
    fails(demand, errno.EPERM, h.zero, PAGE, 0)
    fails(demand, errno.EPERM, h.trim, PAGE, 0)
    fails(demand, errno.EPERM, h.pwrite, bytearray(PAGE), 2**63)
    fails("FUA was not offered", errno.EINVAL, h.pread, PAGE, 0, nbd.CMD_FLAG_FUA)
    h.flush()
    h.cache(PAGE, 0)
    assert h.pread(PAGE, 0) == bytes(PAGE)
    h.shutdown()


def oversized_write(other):
    # Cannot be answered without reading it all: the connection ends, and only that one.
    h = connect()
    try:
        h.pwrite(bytearray(MAX + 1), 0)
        raise AssertionError("an oversized write succeeded")
    except nbd.Error:
        pass
    assert len(other.pread(PAGE, 0)) == PAGE


def disconnect_answers_what_is_under_way():
    h = connect()
    done = []
    for i in range(32):
        buffer = nbd.Buffer(1 << 20)
        h.aio_pread(buffer, i << 20, completion=lambda error: done.append(error.value) or 1)
    h.aio_flush(completion=lambda error: done.append(error.value) or 1)
    h.aio_disconnect()
    while not h.aio_is_closed() and not h.aio_is_dead():
        h.poll(-1)
    assert done == [0] * 33, done


def unread_answers(other):
    # Many requests at once, of which no answer is read for a while.
    h = connect()
    buffers = [nbd.Buffer(1 << 20) for _ in range(60)]
    pending = {h.aio_pread(b, 0) for b in buffers}
    assert len(other.pread(PAGE, 0)) == PAGE
    while pending:
        pending = {c for c in pending if not h.aio_command_completed(c)}
        if pending:
            h.poll(-1)


for structured in (True, False):
    h = connect(structured)
    beyond_the_end(h)
    no_bytes(h)
    unknown_flags(h)
    too_large(h, structured)
    dont_fragment(h, structured)
    block_status(h, structured)
    alive(h)
    h.shutdown()
read_only()
other = connect()
oversized_write(other)
disconnect_answers_what_is_under_way()
unread_answers(other)
