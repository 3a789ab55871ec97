import fc from 'fast-check';
import { expect, test } from 'vitest';
import {
  addressOfVmid,
  FAMILY_MAX,
  ipNumber,
  ipText,
  macNumber,
  macText,
  placeOfWireMac,
  VMID_GATEWAY,
  VMID_MAX,
  vmidOfAddress,
  wireMac,
} from '../../src/network/addresses.js';

test('the scheme, by example', () => {
  expect(wireMac({ family: 0xabcdef, vmid: 0x0102 })).toBe('5e:ab:cd:ef:01:02');
  expect(addressOfVmid(0)).toBe('10.86.0.2');
  expect(addressOfVmid(254)).toBe('10.86.1.0');
  expect(addressOfVmid(VMID_MAX)).toBe('10.86.255.254');
  expect(wireMac({ family: 1, vmid: VMID_GATEWAY })).toBe('5e:00:00:01:ff:ff');
});

test('every place has its own MAC and address, and both lead back', () => {
  const place = fc.record({
    family: fc.integer({ min: 0, max: FAMILY_MAX }),
    vmid: fc.integer({ min: 0, max: VMID_MAX }),
  });
  fc.assert(
    fc.property(place, (it) => {
      expect(placeOfWireMac(wireMac(it))).toEqual(it);
      expect(vmidOfAddress(addressOfVmid(it.vmid))).toBe(it.vmid);
      expect(macText(macNumber(wireMac(it)))).toBe(wireMac(it));
      expect(ipText(ipNumber(addressOfVmid(it.vmid)))).toBe(addressOfVmid(it.vmid));
    }),
  );
});

test('what is outside the scheme is nobody', () => {
  for (const mac of ['52:54:00:53:46:01', '5e:00:00:01:ff:ff', '5e:00:00:01:ff:fd']) {
    expect(placeOfWireMac(mac)).toBeUndefined();
  }
  for (const ip of ['10.86.0.0', '10.86.0.1', '10.86.255.255', '10.87.0.2', '0.0.0.0']) {
    expect(vmidOfAddress(ip)).toBeUndefined();
  }
});

test('ids and addresses that are none are refused', () => {
  const refused = expect.objectContaining({ code: 'E_ARGUMENT' });
  for (const vmid of [-1, VMID_MAX + 1, 0.5, Number.NaN]) {
    expect(() => addressOfVmid(vmid)).toThrow(refused);
    expect(() => wireMac({ family: 0, vmid })).toThrow(refused);
  }
  expect(() => wireMac({ family: FAMILY_MAX + 1, vmid: 0 })).toThrow(refused);
  for (const mac of ['', '5e', '5e:00:00:00:00:0g', '5e-00-00-00-00-00', '5e:0:0:0:0:0']) {
    expect(() => macNumber(mac)).toThrow(refused);
  }
  for (const ip of ['', '10.86.0', '10.86.0.256', '10.86.0.1.2', '0x0a.1.1.1', ' 10.0.0.1']) {
    expect(() => ipNumber(ip)).toThrow(refused);
  }
});
