// PyTorch beside us on the same device: a child process (peer.py) that answers one piece of work a line. Absent where no Python
// with torch is found, or with --no-peer; every answer is then undefined.
import { spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';

export class Peer {
  /** @param device `cuda` or `cpu`: where PyTorch works */
  constructor(device) {
    const python = process.env.KEELGRAD_PEER_PYTHON ?? 'python3';
    const script = join(import.meta.dirname, 'peer.py');
    this.child = spawn(python, [script, device], { stdio: ['pipe', 'pipe', 'inherit'] });
    this.lines = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
  }

  static open(device, wanted) {
    const python = process.env.KEELGRAD_PEER_PYTHON ?? 'python3';
    if (wanted && spawnSync(python, ['-c', 'import torch']).status === 0) return new Peer(device);
    if (wanted) console.error(`no PyTorch beside ours: ${python} has no torch; set KEELGRAD_PEER_PYTHON`);
    return new NoPeer();
  }

  /** What peer.py measured of one piece of work: { seconds, bytes?, ... }; empty where it could not. */
  async measure(kind, work = {}) {
    this.child.stdin.write(`${JSON.stringify({ kind, ...work })}\n`);
    const { value, done } = await this.lines.next();
    if (done) throw new Error('the peer process ended');
    const answer = JSON.parse(value);
    if (answer.error) console.error(`peer: ${kind}: ${answer.error}`);
    return answer;
  }

  close() {
    this.child.stdin.end();
  }
}

class NoPeer {
  async measure() {
    return {};
  }

  close() {}
}
