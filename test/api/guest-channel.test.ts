import { afterEach, beforeEach, describe, expect, it } from 'vitest';
import type { GuestCall, GuestChannel } from '../../src/api/guest-channel.js';
import { SnowflockError } from '../../src/common/errors.js';
import { AgentRig, identityOf } from './agent-rig.js';

let rig: AgentRig;
beforeEach(async () => {
  rig = await AgentRig.start();
});
afterEach(async () => {
  const errors = rig.agentErrors;
  await rig.stop();
  expect(errors).toBe('');
});

/** Resolves with the next call of this verb, which stays unanswered. */
function nextCall(channel: GuestChannel, wanted: string): Promise<GuestCall> {
  return new Promise((resolve) => {
    channel.setCallHandler((call) => {
      if (call.verb === wanted) resolve(call);
      return new Promise(() => {});
    });
  });
}

describe('identity', () => {
  it('is taken on and answered', async () => {
    const channel = await rig.channel();
    const ready = await channel.hello(identityOf(0));
    expect(ready.net).toBe('ok');
    expect(await rig.identity('ip')).toEqual(['10.86.0.2']);
    expect(await rig.identity('hostname')).toEqual(['vm 0%']);
    expect(await channel.ping(5000)).toBeGreaterThan(0);
  });

  it('is taken on once for one epoch, again for another', async () => {
    const identity = identityOf(0);
    await (await rig.channel()).hello(identity);
    await (await rig.channel()).hello(identity);
    expect(await rig.identity('ip')).toEqual(['10.86.0.2']);
    await (await rig.channel()).hello(identityOf(5));
    expect(await rig.identity('ip')).toEqual(['10.86.0.2', '10.86.0.7']);
  });

  it('is answered with E_GUEST if the guest cannot take it on', async () => {
    const channel = await rig.channel();
    await expect(channel.hello({ ...identityOf(0), vmid: 70_000 })).rejects.toMatchObject({
      code: 'E_GUEST',
    });
  });

  it('is told again to an agent that was restarted', async () => {
    const channel = await rig.channel();
    await channel.hello(identityOf(3));
    const session = channel.exec({ argv: ['cat'] });
    await rig.killAgent();
    await rig.startAgent();
    await expect(session.exited).rejects.toMatchObject({ code: 'E_GUEST' });
    await expect.poll(async () => (await rig.sf('info', '--local')).stdout).toContain('vmid 3');
  });

  it('is not taken from a half line of the parent, nor are its commands', async () => {
    await (await rig.channel()).hello(identityOf(0));
    rig.inject('exec x1 argv=dG91Y2gA window=1000');
    const clone = await rig.channel();
    await clone.hello(identityOf(4));
    rig.inject('reply 99 ok garbage');
    const again = await rig.channel();
    await again.hello(identityOf(6));
    expect(await rig.identity('ip')).toEqual(['10.86.0.2', '10.86.0.6', '10.86.0.8']);
  });
});

describe('calls', () => {
  it('reach the host and their answers the tool', async () => {
    const channel = await rig.channel();
    channel.setCallHandler(async ({ verb, args }) => {
      if (verb === 'request_ticket') {
        expect(args).toMatchObject({ n: '8', hierarchical: '0' });
        return { ticket: 't-1', allocation: '5', vmids: '1-3,7,9' };
      }
      if (verb === 'join') return { results: '1:0,2:3,7:E_CLONE_START' };
      if (verb === 'clone') return { vmid: '0' };
      throw new SnowflockError('E_TICKET_USED', 'ticket t=1 % was used');
    });
    await channel.hello(identityOf(0));
    expect(await rig.sf('--json', 'ticket', '8')).toMatchObject({
      status: 0,
      stdout: '{"ticket":"t-1","requested":8,"allocation":5,"vmids":[1,2,3,7,9]}\n',
    });
    expect(await rig.sf('clone', 't-1')).toMatchObject({ status: 0, stdout: '0\n' });
    expect(await rig.sf('join', 't-1')).toMatchObject({
      status: 4,
      stdout: '1 0\n2 3\n7 E_CLONE_START\n',
    });
    const failed = await rig.sf('kill', 't-1');
    expect(failed.status).toBe(1);
    expect(failed.stderr).toContain('E_TICKET_USED');
    expect(await rig.sf('ip', '300')).toMatchObject({ stdout: '10.86.1.46\n' });
    expect(await rig.sf('nonsense')).toMatchObject({ status: 2 });
  });

  it('made before the host said hello wait for it', async () => {
    const client = await rig.client();
    const answer = client.call('call a info');
    const channel = await rig.channel();
    channel.setCallHandler(async () => ({ text: 'hello there' }));
    await channel.hello(identityOf(0));
    expect(await answer).toBe('reply a ok text=hello%20there');
  });

  it('pending when the daemon restarts are sent again with the same id', async () => {
    const identity = identityOf(0);
    const first = await rig.channel();
    await first.hello(identity);
    const seen = nextCall(first, 'join');
    const client = await rig.client();
    const answer = client.call('call j join ticket=t');
    const before = await seen;
    const second = await rig.channel();
    const again = nextCall(second, 'join');
    await second.hello(identity);
    expect(await again).toEqual(before);
    second.reply(before.id, { results: '1:0' });
    expect(await answer).toBe('reply j ok results=1:0');
  });

  it('end with E_STATE in a clone, except the one that cloned', async () => {
    const parent = await rig.channel();
    await parent.hello(identityOf(0));
    const joiner = await rig.client();
    const joining = nextCall(parent, 'join');
    const joined = joiner.call('call j join ticket=t');
    await joining;
    const cloner = await rig.client();
    const cloning = nextCall(parent, 'clone');
    const cloned = cloner.call('call c clone ticket=t');
    const { id } = await cloning;
    // From here on this agent is the clone's.
    const clone = await rig.channel();
    await clone.hello(identityOf(3), { id, args: { vmid: '3' } });
    expect(await cloned).toBe('reply c ok vmid=3');
    expect(await joined).toMatch(/^reply j error code=E_STATE /);
    expect(await joiner.call('call k identity')).toContain('reply k ok vmid=3 family=9');
  });

  it('all end with E_STATE in a clone made from outside', async () => {
    const parent = await rig.channel();
    await parent.hello(identityOf(0));
    const client = await rig.client();
    const calling = nextCall(parent, 'info');
    const answer = client.call('call i info');
    await calling;
    await (await rig.channel()).hello(identityOf(1));
    expect(await answer).toMatch(/^reply i error code=E_STATE /);
  });

  it('of a program that is gone are forgotten', async () => {
    const channel = await rig.channel();
    await channel.hello(identityOf(0));
    const calling = nextCall(channel, 'join');
    const client = await rig.client();
    client.socket.write('call j join ticket=t\n');
    const { id } = await calling;
    client.socket.destroy();
    channel.reply(id, { results: '' });
    expect((await rig.sf('info', '--local')).status).toBe(0);
  });

  it('that are malformed or too long end the connection of who made them', async () => {
    const channel = await rig.channel();
    await channel.hello(identityOf(0));
    for (const line of ['nonsense\n', 'call \n', `call a ${'x'.repeat(8000)}`, 'call a b\0c\n']) {
      const client = await rig.client();
      const closed = new Promise((resolve) => client.socket.on('close', resolve));
      client.socket.write(line);
      await closed;
    }
    expect(await channel.ping(5000)).toBeGreaterThan(0);
  });

  it('beyond the number of callers are refused, and room is made when callers leave', async () => {
    const channel = await rig.channel();
    await channel.hello(identityOf(0));
    const clients = [];
    for (let i = 0; i < 32; i++) clients.push(await rig.client());
    for (const client of clients) await client.call('call a identity');
    expect(await (await rig.client()).line()).toContain('E_CAPACITY');
    for (const client of clients) client.socket.destroy();
    await expect.poll(async () => (await rig.sf('info', '--local')).status).toBe(0);
  });
});
