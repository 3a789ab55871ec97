// A TCP stream that goes on while others attack, run inside a namespace: `serve ADDRESS PORT` sends
// back what it gets and says `ready`; `talk FROM ADDRESS PORT` sends blocks one after the other and
// checks each echo. A line on its stdin asks for proof of life: after 20 more blocks it prints their
// number so far. A wrong byte, a reset or an end ends it with exit code 1.
import { randomBytes } from 'node:crypto';
import { connect, createServer } from 'node:net';

const BLOCK_BYTES = 8192;
const PROOF_BLOCKS = 20;
const PAUSE_MS = 1; // leaves a CPU to the attackers
const [mode, address, ...rest] = process.argv.slice(2);

function fail(why) {
  process.stderr.write(`${why}\n`);
  process.exit(1);
}

if (mode === 'serve') {
  const server = createServer((socket) => socket.pipe(socket));
  server.listen(Number(rest[0]), address, () => process.stdout.write('ready\n'));
} else {
  const [to, port] = rest;
  const socket = connect({
    host: to,
    port: Number(port),
    localAddress: address,
    localPort: Number(port),
  });
  socket.on('error', (error) => fail(error.message));
  socket.on('close', () => fail('the stream ended'));
  let blocks = 0;
  let due = [];
  process.stdin.on('data', () => due.push(blocks + PROOF_BLOCKS));
  let block = randomBytes(BLOCK_BYTES);
  let got = 0;
  socket.on('connect', () => socket.write(block));
  socket.on('data', (data) => {
    if (!data.equals(block.subarray(got, got + data.length))) fail('a wrong byte');
    got += data.length;
    if (got < BLOCK_BYTES) return;
    blocks++;
    for (const at of due) if (at <= blocks) process.stdout.write(`${blocks}\n`);
    due = due.filter((at) => at > blocks);
    block = randomBytes(BLOCK_BYTES);
    got = 0;
    setTimeout(() => socket.write(block), PAUSE_MS);
  });
}
