import { randomBytes, randomUUID } from 'node:crypto';

/** A generation id: 32 lower-case hexadecimal characters, random. */
export function newGenerationId(): string {
  return randomBytes(16).toString('hex');
}

/** A generation's key: 32 random bytes as hexadecimal; it travels only inside descriptors. */
export function newGenerationKey(): string {
  return randomBytes(32).toString('hex');
}

/** Unguessable, for what a guest or another host must not be able to name by chance. */
export function newSecretId(prefix: string): string {
  return `${prefix}-${randomBytes(12).toString('hex')}`;
}

/** Unique for ever; marks one identity of one VM, so that a repeated hello is told from a new one. */
export function newEpoch(): string {
  return randomUUID();
}

/** Short (8 hex characters), since it becomes part of Unix socket paths; unique per host. */
export function newVmId(): string {
  return `vm${randomBytes(4).toString('hex')}`;
}
