# Sends an NBD server what no decent client would, with libnbd's checks off. SOCKET SIZE.
# Exits with an error if the server answers anything but what the protocol wants.
import errno
import sys

import nbd

path, size = sys.argv[1], int(sys.argv[2])


def connect(structured=True):
    h = nbd.NBD()
    h.set_strict_mode(0)
    h.set_request_structured_replies(structured)
    h.add_meta_context(nbd.CONTEXT_BASE_ALLOCATION)
    h.connect_unix(path)
    return h


def fails(want, call, *args):
    try:
        call(*args)
    except nbd.Error as e:
        assert e.errnum == want, f"{call.__name__}{args[1:]}: {e.errnum}, wanted {want}"
        return
    raise AssertionError(f"{call.__name__}{args[1:]} succeeded")


for structured in (True, False):
    h = connect(structured)
    page = bytearray(4096)
    fails(errno.EINVAL, h.pread, 4096, size)
    fails(errno.EINVAL, h.pread, 4096, size - 1)
    fails(errno.EINVAL, h.pread, 4096, 2**64 - 4096)
    fails(errno.EINVAL, h.pread, 1, 2**63)
    fails(errno.EINVAL, h.pread, 0, 0)
    fails(errno.ENOSPC, h.pwrite, page, size - 1)
    fails(errno.ENOSPC, h.pwrite, page, 2**64 - 1)
    fails(errno.ENOSPC, h.pwrite, bytearray(1 << 20), size)
    fails(errno.ENOSPC, h.zero, 4096, size)
    fails(errno.EINVAL, h.trim, 4096, size)
    fails(errno.EINVAL, h.trim, 0, 0)
    fails(errno.EINVAL, h.cache, 4096, 0)
    fails(errno.EINVAL, h.pread, 4096, 0, 1 << 9)
    fails(errno.EINVAL, h.pwrite, page, 0, 1 << 9)
    fails(errno.EINVAL, h.flush, 1 << 9)
    fails(errno.EINVAL, h.zero, 4096, 0, nbd.CMD_FLAG_FAST_ZERO)
    fails(errno.EINVAL, h.pread, (32 << 20) + 1, 0)
    # After all that the connection still works.
    h.pwrite(b"\x5a" * 4096, size - 4096)
    assert h.pread(4096, size - 4096) == b"\x5a" * 4096
    assert h.pread(1, size - 1) == b"\x5a"
    h.pwrite(b"\x00" * 4096, size - 4096, nbd.CMD_FLAG_FUA)
    if structured:
        extents = []
        h.block_status(size, 0, lambda context, at, entries, error: extents.extend(entries))
        assert sum(extents[::2]) == size, extents
        fails(errno.EINVAL, h.block_status, 4096, size, lambda *a: 0)
        h.block_status(size, 0, lambda *a: 0, nbd.CMD_FLAG_REQ_ONE)
    else:
        fails(errno.EINVAL, h.block_status, 4096, 0, lambda *a: 0)
    h.shutdown()

# A write too large to be answered ends the connection, and only that one.
h = connect()
other = connect()
try:
    h.pwrite(bytearray((32 << 20) + 1), 0)
    raise AssertionError("an oversized write succeeded")
except nbd.Error:
    pass
assert len(other.pread(4096, 0)) == 4096

# Many requests at once, of which no answer is read for a while.
h = connect()
buffers = [nbd.Buffer(1 << 20) for _ in range(60)]
cookies = [h.aio_pread(b, 0) for b in buffers]
assert len(other.pread(4096, 0)) == 4096
pending = set(cookies)
while pending:
    pending = {c for c in pending if not h.aio_command_completed(c)}
    if pending:
        h.poll(-1)
