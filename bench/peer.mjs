// PyTorch beside us: a child process (peer.py) that times the same work in the same run. Absent where no Python with torch is
// found; the reason is printed once.
import { spawn, spawnSync } from 'node:child_process';
import { join } from 'node:path';
import { createInterface } from 'node:readline';
import { root } from './build.mjs';

const script = join(root, 'bench', 'peer.py');

function environment() {
  const env = { ...process.env };
  for (const name of Object.keys(env)) if (name.startsWith('OPENBLAS_')) delete env[name];
  return env;
}

/** A Python with torch, or why there is none. */
function findPython() {
  const python = process.env.KEELGRAD_PEER_PYTHON ?? 'python3';
  const found = spawnSync(python, ['-c', 'import torch'], { env: environment() });
  if (found.status === 0) return { python };
  const named = process.env.KEELGRAD_PEER_PYTHON ? `${python} has no torch` : 'python3 has no torch';
  return { reason: `${named}; set KEELGRAD_PEER_PYTHON to a Python that has` };
}

export class Peer {
  constructor(python, threads) {
    this.child = spawn(python, [script, String(threads)], { env: environment(), stdio: ['pipe', 'pipe', 'inherit'] });
    this.lines = createInterface({ input: this.child.stdout })[Symbol.asyncIterator]();
  }

  /** Opens a peer, or prints why the tables have none. */
  static open(threads, wanted = true) {
    const { python, reason } = wanted ? findPython() : { reason: 'switched off' };
    if (python) return new Peer(python, threads);
    console.error(`no PyTorch beside ours: ${reason}`);
    return null;
  }

  /** { best, median, ... } of one piece of work; null where the peer does not know it. */
  async time(work) {
    this.child.stdin.write(`${JSON.stringify(work)}\n`);
    const { value, done } = await this.lines.next();
    if (done) throw new Error('the peer process ended');
    const answer = JSON.parse(value);
    if (answer.error) console.error(`peer: ${work.op}: ${answer.error}`);
    return answer.best === undefined ? null : answer;
  }

  close() {
    this.child.stdin.end();
  }
}
