export { addHost, type HostSpec, initCluster } from './ca.js';
export {
  type EventOptions,
  PeerClient,
  type PeerClientOptions,
  type RequestOptions,
} from './client.js';
export { Cluster, type HostReach } from './cluster.js';
export {
  type ClusterConfig,
  DEFAULT_CONTROL_PORT,
  type HostAddress,
  HostConfigFile,
  type HostResources,
  loadClusterConfig,
  parseClusterConfig,
  RUN_DIR_BYTES_MAX,
} from './config.js';
export { createPeerServer, listenForPeers, type PeerServer, sendEvents } from './server.js';
export { loadTlsIdentity, type TlsIdentity } from './tls.js';
export { BODY_BYTES_MAX } from './wire.js';
