// Runs in the second host's namespace and speaks to the first host's daemon as its peer: announces a
// fork, then sends a descriptor that is not what was announced. Prints a JSON line for each case.
// Arguments: host.json of the second host, record of a VM of the first host.
import { readFileSync } from 'node:fs';

const at = (/** @type {string} */ path) =>
  import(new URL(`../../dist/src/${path}`, import.meta.url));
const { Cluster } = await at('cluster/cluster.js');
const { loadClusterConfig } = await at('cluster/config.js');
const { newEpoch, newGenerationId, newGenerationKey, newVmId } = await at('common/ids.js');
const { encodeDescriptor } = await at('descriptor/index.js');
const { randomGroup } = await at('mcdist/groups.js');
const { RemoteHost } = await at('sfld/peers.js');

const [configPath = '', recordPath = ''] = process.argv.slice(2);
const cluster = new Cluster(loadClusterConfig(configPath));
const peer = new RemoteHost(cluster.peer('h1'));
const parent = JSON.parse(readFileSync(recordPath, 'utf8'));

/** @param {number} bytes */
function generation(bytes) {
  const id = newGenerationId();
  const { group, port } = randomGroup();
  const source = { address: '10.85.0.2', port: 7448, group, group_port: port };
  return { generation: id, pages: bytes / 4096, source: { ...source, key: newGenerationKey() } };
}

/** @type {Record<string, (bytes: Buffer) => Buffer>} */
const spoil = {
  'cut short': (bytes) => bytes.subarray(0, bytes.length - 1),
  'half of it': (bytes) => bytes.subarray(0, bytes.length >> 1),
  altered: (bytes) => {
    const copy = Buffer.from(bytes);
    copy.writeUInt8(copy.readUInt8(copy.length >> 1) ^ 1, copy.length >> 1);
    return copy;
  },
  'too long': (bytes) => Buffer.concat([bytes, Buffer.alloc(1)]),
  'of another memory size': (bytes) => bytes,
  'of another generation': (bytes) => bytes,
};

for (const [title, change] of Object.entries(spoil)) {
  const ram = generation(parent.ram_bytes);
  const disk = generation(parent.disk_bytes);
  const fork = `fork-${newGenerationId().slice(0, 24)}`;
  await peer.reserve(fork, 1, { memory_bytes: parent.ram_bytes, vcpus: 1 });
  await peer.prepare({
    fork,
    parent: { host: 'h2', vm: newVmId() },
    family: 7,
    family_host: 'h2',
    image: 'minimal',
    name: 'stranger',
    ram_bytes: parent.ram_bytes,
    vcpus: 1,
    shape: parent.shape,
    ram,
    disk,
    reservation: fork,
    clones: [{ vm: newVmId(), vmid: 1, epoch: newEpoch(), seed: newGenerationKey(), reply: null }],
  });
  const other = title.includes('memory size') ? 2 * parent.ram_bytes : parent.ram_bytes;
  const descriptor = encodeDescriptor({
    created_ms: Date.now(),
    parent: { vm: 'vm00000000', host: 'h2', vmid: 0 },
    machine: {
      ...parent.shape,
      ram_bytes: other,
      ram_layout: [{ guest_address: 0, offset: 0, length: other }],
    },
    ram: title.includes('generation')
      ? generation(parent.ram_bytes)
      : { ...ram, pages: other / 4096 },
    disk,
    identity: { family: 7, guest_mac: '52:54:00:53:46:01', network: '10.86.0.0/16' },
    state: Buffer.from('not a machine state'),
    zero_map: Buffer.alloc(other / 4096 / 8),
  });
  const code = await peer.start(fork, change(descriptor)).then(
    () => 'accepted',
    (/** @type {{ code: string }} */ error) => error.code,
  );
  const vms = (await peer.list()).map((/** @type {{ name: string }} */ vm) => vm.name);
  const { memory_bytes: free } = await peer.capacity();
  console.log(JSON.stringify({ title, code, vms, free }));
}
cluster.close();
process.exit(0);
