// One end of a TCP transfer, run inside a namespace: `listen ADDRESS` prints its port, then what it
// received; `send ADDRESS PORT BYTES` prints what it sent: bytes and SHA-256.
import { createHash, randomBytes } from 'node:crypto';
import { connect, createServer } from 'node:net';

const [mode, address, port, bytes] = process.argv.slice(2);
const hash = createHash('sha256');
const report = (count) => process.stdout.write(`${count} ${hash.digest('hex')}\n`);

if (mode === 'listen') {
  const server = createServer((socket) => {
    let count = 0;
    socket.on('data', (data) => {
      count += data.length;
      hash.update(data);
    });
    socket.on('end', () => {
      report(count);
      socket.end();
      server.close();
    });
  });
  server.listen(0, address, () => process.stdout.write(`${server.address().port}\n`));
} else {
  const data = randomBytes(Number(bytes));
  hash.update(data);
  const socket = connect(Number(port), address, () => socket.end(data));
  socket.on('close', () => report(data.length));
  socket.resume();
}
