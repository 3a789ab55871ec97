import { SnowflockError } from '../common/errors.js';
import { LZ4_LEGACY_MAGIC, unpackLz4Legacy } from './lz4.js';

/**
 * The uncompressed kernel (ELF) inside a bzImage. QEMU's `microvm` boots it directly through its
 * PVH entry, which skips the decompressor: under emulation that is a good part of the boot.
 * Layout of the bzImage: Documentation/arch/x86/boot.rst (setup_sects, payload_offset,
 * payload_length). E_CORRUPT if it is none, E_REQUIREMENT if its compression is not LZ4.
 */
export function extractVmlinux(bzImage: Buffer): Uint8Array {
  if (bzImage.length < 0x260 || bzImage.toString('latin1', 0x202, 0x206) !== 'HdrS') {
    throw new SnowflockError('E_CORRUPT', 'the kernel file is not a bzImage');
  }
  const setupSectors = bzImage.readUInt8(0x1f1) || 4;
  const start = (setupSectors + 1) * 512 + bzImage.readUInt32LE(0x248);
  const payload = bzImage.subarray(start, start + bzImage.readUInt32LE(0x24c));
  if (payload.length < 8 || payload.readUInt32LE(0) !== LZ4_LEGACY_MAGIC) {
    throw new SnowflockError(
      'E_REQUIREMENT',
      'the kernel is not compressed with LZ4, as Debian 12 cloud kernels are',
    );
  }
  const kernel = unpackLz4Legacy(payload);
  if (Buffer.from(kernel.subarray(0, 4)).toString('latin1') !== '\x7fELF') {
    throw new SnowflockError('E_CORRUPT', 'the unpacked kernel is not an ELF file');
  }
  return kernel;
}
