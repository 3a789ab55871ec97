"""Sockets in network namespaces, for tests of the gateway: one process, a thread for each request,
which enters the namespace that the request names. Requests and answers are lines of JSON."""

import ctypes
import errno
import json
import os
import socket
import struct
import sys
import threading
import time

LIBC = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNET = 0x40000000
LIMIT_S = 10
held = {}
served = {}
accepted = {}
running = {}
out = threading.Lock()


def enter(path):
    fd = os.open(path, os.O_RDONLY)
    try:
        if LIBC.setns(fd, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
    finally:
        os.close(fd)


def echo(connection):
    with connection:
        try:
            while data := connection.recv(65536):
                connection.sendall(data)
        except OSError:
            pass


def serve_tcp(request):
    server = socket.create_server((request["address"], request["port"]), backlog=256)

    def loop():
        while True:
            connection, _ = server.accept()
            accepted.setdefault(request["port"], []).append(connection)
            threading.Thread(target=echo, args=(connection,), daemon=True).start()

    threading.Thread(target=loop, daemon=True).start()
    return {}


def serve_udp(request):
    server = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, 33, 1 << 24)  # SO_RCVBUFFORCE
    server.bind((request["address"], request["port"]))
    counts = served.setdefault(f"{request['address']}:{request['port']}", [0, 0])

    def loop():
        while True:
            data, sender = server.recvfrom(65536)
            counts[0] += 1
            counts[1] += len(data)
            if data.startswith(b"echo"):
                server.sendto(data, sender)

    threading.Thread(target=loop, daemon=True).start()
    return {}


def opened(request):
    """A connection over which a word has gone there and back."""
    connection = socket.create_connection((request["to"], request["port"]), timeout=request.get("limit_s", LIMIT_S))
    try:
        talk(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def talk(connection, size=4):
    connection.sendall(b"x" * size)
    left = size
    while left:
        data = connection.recv(left)
        if not data:
            raise ConnectionResetError(errno.ECONNRESET, "closed")
        left -= len(data)


def tcp(request):
    opened(request).close()
    return {}


def hold(request):
    held[request["name"]] = opened(request)
    return {}


def say(request):
    talk(held[request["name"]], request.get("size", 4))
    return {}


def release(request):
    held.pop(request["name"]).close()
    return {}


def push(request):
    """From the server of a port, unasked, on the newest of its connections."""
    accepted[request["port"]][-1].sendall(b"more")
    return {}


def stream(request):
    """Words there and back without a pause, until `stop` names it; how many bytes came back."""
    connection = opened(request)
    running[request["name"]] = True
    total = 0
    with connection:
        while running[request["name"]]:
            talk(connection, 20000)
            total += 20000
    return {"bytes": total}


def stop(request):
    running[request["name"]] = False
    return {}


def pmtu(request):
    """What a UDP socket learns of the path, from errors that answer datagrams with DF."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER, IP_PMTUDISC_DO
        one.connect((request["to"], request["port"]))
        limit = time.monotonic() + LIMIT_S
        mtu = first = one.getsockopt(socket.IPPROTO_IP, 14)  # IP_MTU
        while mtu == first and time.monotonic() < limit:
            try:
                one.send(b"d" * 1400)
            except OSError as error:
                if error.errno != errno.EMSGSIZE:
                    raise
            time.sleep(0.01)
            mtu = one.getsockopt(socket.IPPROTO_IP, 14)
    return {"mtu": mtu}


def udp(request):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.settimeout(request.get("limit_s", LIMIT_S))
        if "source" in request:
            one.bind((request["source"], 0))
        one.connect((request["to"], request["port"]))
        one.send(b"echo")
        one.recv(100)
    return {}


def flood(request):
    """Datagrams at a rate; after `lead` seconds the counts of the server named by `at` begin."""
    payload = b"f" * request["size"]
    counts = served[request["at"]]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.connect((request["to"], request["port"]))
        begin = time.monotonic()
        sent, first, since = 0, None, begin
        while (now := time.monotonic()) - begin < request["seconds"]:
            if first is None and now - begin >= request["lead"]:
                first, since = list(counts), now
            if sent <= (now - begin) * request["rate"]:
                one.send(payload)
                sent += 1
            else:
                time.sleep(0.001)
        last, end = list(counts), time.monotonic()
    seconds = end - since
    return {
        "sent": sent,
        "packets_per_s": (last[0] - first[0]) / seconds,
        "bytes_per_s": (last[1] - first[1]) / seconds,
    }


def ping(request):
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as one:
        one.settimeout(LIMIT_S)
        one.connect((request["to"], 0))
        one.setsockopt(socket.IPPROTO_IP, 11, 1)  # IP_RECVERR
        body = struct.pack("!BBHHH", 8, 0, 0, 77, 1)
        total = sum(struct.unpack("!4H", body))
        total = (total & 0xFFFF) + (total >> 16)
        one.send(body[:2] + struct.pack("!H", ~total & 0xFFFF) + body[4:])
        while one.recv(2000)[20] != 0:
            pass
    return {}


def answer(request):
    result = {"id": request["id"]}
    begin = time.monotonic()
    try:
        enter(request["netns"])
        result.update(globals()[request["op"]](request))
        result["outcome"] = "ok"
    except OSError as error:
        late = isinstance(error, TimeoutError) and error.errno is None
        result["outcome"] = "timeout" if late else errno.errorcode.get(error.errno, str(error))
    except Exception as error:  # a defect of the test: it must not wait for ever
        result["outcome"] = repr(error)
    result["ms"] = (time.monotonic() - begin) * 1000
    with out:
        print(json.dumps(result), flush=True)


for line in sys.stdin:
    threading.Thread(target=answer, args=(json.loads(line),), daemon=True).start()
