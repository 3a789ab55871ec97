import { readFileSync } from 'node:fs';
import type { TLSSocket } from 'node:tls';
import { SnowflockError } from '../common/errors.js';
import type { ClusterConfig } from './config.js';

/** This host's key and certificate and the cluster's authority, PEM. */
export interface TlsIdentity {
  readonly ca: Buffer;
  readonly cert: Buffer;
  readonly key: Buffer;
}

/** Reads the files named by the configuration. @throws {SnowflockError} `E_CONFIG`. */
export function loadTlsIdentity(config: Pick<ClusterConfig, 'tls' | 'file'>): TlsIdentity {
  const read = (field: string, file: string): Buffer => {
    try {
      return readFileSync(file);
    } catch (error) {
      const reason = error instanceof Error ? error.message : String(error);
      throw new SnowflockError('E_CONFIG', `${config.file}: /tls/${field}: ${reason}`);
    }
  };
  return {
    ca: read('ca', config.tls.caFile),
    cert: read('cert', config.tls.certFile),
    key: read('key', config.tls.keyFile),
  };
}

/** The host name a verified peer's certificate carries (its DNS name), or undefined. */
export function peerHostName(socket: TLSSocket): string | undefined {
  if (!socket.authorized) return undefined;
  const names = socket.getPeerCertificate().subjectaltname ?? '';
  for (const name of names.split(', ')) {
    if (name.startsWith('DNS:')) return name.slice(4);
  }
  return undefined;
}
