/**
 * What a descriptor says, apart from its two binary parts (device state, zero map): the header, as
 * JSON inside the encoding. Field names are wire names.
 */
import { type Static, Type } from 'typebox';
import { MachineShape } from '../hypervisor/shape.js';

const strict = { additionalProperties: false } as const;

const IPV4 = '(?:25[0-5]|2[0-4]\\d|1?\\d?\\d)(?:\\.(?:25[0-5]|2[0-4]\\d|1?\\d?\\d)){3}';
const MULTICAST = '(?:22[4-9]|23\\d)(?:\\.(?:25[0-5]|2[0-4]\\d|1?\\d?\\d)){3}';
const Address = Type.String({ pattern: `^${IPV4}$`, maxLength: 15 });
const Port = Type.Integer({ minimum: 1, maximum: 65535 });
const GenerationId = Type.String({ pattern: '^[0-9a-f]{32}$' });
const Name = Type.String({ minLength: 1, maxLength: 255 });

/** Pages of 4 KiB; 2^32 of them are 16 TiB. */
const Pages = Type.Integer({ minimum: 1, maximum: 2 ** 32 });

/** Where a generation's pages come from: requests by unicast, answers to a multicast group. */
export const PageSource = Type.Object(
  {
    address: Address,
    port: Port,
    group: Type.String({ pattern: `^${MULTICAST}$`, maxLength: 15 }),
    group_port: Port,
    /** Encrypts and authenticates every packet of this generation. Travels over mutual TLS alone. */
    key: Type.String({ pattern: '^[0-9a-f]{64}$' }),
  },
  strict,
);
export type PageSource = Static<typeof PageSource>;

export const GenerationRef = Type.Object(
  { generation: GenerationId, pages: Pages, source: PageSource },
  strict,
);
export type GenerationRef = Static<typeof GenerationRef>;

export const NetworkIdentity = Type.Object(
  {
    family: Type.Integer({ minimum: 0, maximum: 0xffffff }),
    guest_mac: Type.String({ pattern: '^[0-9a-f]{2}(:[0-9a-f]{2}){5}$' }),
    /** The family's private network, e.g. `10.86.0.0/16`. */
    network: Type.String({ pattern: `^${IPV4}/(?:[89]|[12]\\d|30)$`, maxLength: 18 }),
  },
  strict,
);
export type NetworkIdentity = Static<typeof NetworkIdentity>;

export const DescriptorHeader = Type.Object(
  {
    /** Milliseconds since 1970 at the parent's host. */
    created_ms: Type.Integer({ minimum: 0, maximum: Number.MAX_SAFE_INTEGER }),
    parent: Type.Object(
      { vm: Name, host: Name, vmid: Type.Integer({ minimum: 0, maximum: 0xffff }) },
      strict,
    ),
    machine: MachineShape,
    ram: GenerationRef,
    disk: Type.Optional(GenerationRef),
    identity: NetworkIdentity,
  },
  strict,
);
export type DescriptorHeader = Static<typeof DescriptorHeader>;

export interface Descriptor extends DescriptorHeader {
  /** Device and CPU state, as the driver captured it. */
  state: Buffer;
  /**
   * RAM pages that need no fetch because they are all zeros: one bit a page, page 0 is the lowest
   * bit of byte 0. Ceil(pages / 8) bytes; spare bits are 0.
   */
  zero_map: Buffer;
}
