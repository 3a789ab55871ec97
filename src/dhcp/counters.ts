/** What DHCP servers count: packets heard by type, answers by type, and packets without use by reason. */
import { MessageType } from '../../packages/dhcp-packet/src/index.js';

/** Message types that clients send. Packets are counted here once they are decoded. */
export const RECEIVED = {
  discover: MessageType.DISCOVER,
  request: MessageType.REQUEST,
  decline: MessageType.DECLINE,
  release: MessageType.RELEASE,
  inform: MessageType.INFORM,
} as const;

/** Of answers that went out. */
export const SENT = {
  offer: MessageType.OFFER,
  ack: MessageType.ACK,
  nak: MessageType.NAK,
} as const;

/** Why a packet changed nothing and no answer went out. */
export const DROPS = {
  flood: 'came faster than it is read; lost in the kernel',
  malformed: 'lengths or options that cannot be',
  foreign_mac: "came from another MAC address than the guest's",
  not_guest: 'is no request of this guest',
  relayed: 'came through a relay',
  no_type: 'has no message type that clients send',
  other_server: 'is for another server',
  no_address: 'REQUEST that names no address',
  other_address: "INFORM, DECLINE or RELEASE of an address that is not the VM's",
  not_sent: 'its answer found no room, or the interface was down',
} as const;

export type ReceivedType = keyof typeof RECEIVED;
export type SentType = keyof typeof SENT;
export type DropReason = keyof typeof DROPS;

/** They only grow. */
export interface DhcpCounters {
  received: Record<ReceivedType, number>;
  sent: Record<SentType, number>;
  dropped: Record<DropReason, number>;
}

function zeros<K extends string>(of: Record<K, unknown>): Record<K, number> {
  return Object.fromEntries(Object.keys(of).map((name) => [name, 0])) as Record<K, number>;
}

export function newCounters(): DhcpCounters {
  return { received: zeros(RECEIVED), sent: zeros(SENT), dropped: zeros(DROPS) };
}

/** The type of a client's message, undefined if clients send no such message. */
export function receivedType(type: number | undefined): ReceivedType | undefined {
  const names = Object.keys(RECEIVED) as ReceivedType[];
  return names.find((name) => RECEIVED[name] === type);
}

/** In the text format of Prometheus. */
export function dhcpMetrics(host: string, counters: DhcpCounters): string {
  const family = (name: string, help: string, label: string, of: Record<string, number>) => [
    `# HELP ${name} ${help}`,
    `# TYPE ${name} counter`,
    ...Object.entries(of).map(([key, n]) => `${name}{host="${host}",${label}="${key}"} ${n}`),
  ];
  const { received, sent, dropped } = counters;
  return [
    ...family(
      'snowflock_dhcp_received_total',
      'DHCP packets from guests, by message type.',
      'type',
      received,
    ),
    ...family(
      'snowflock_dhcp_sent_total',
      'DHCP answers to guests, by message type.',
      'type',
      sent,
    ),
    ...family(
      'snowflock_dhcp_dropped_total',
      'DHCP packets from guests that had no effect, by reason.',
      'reason',
      dropped,
    ),
    '',
  ].join('\n');
}
