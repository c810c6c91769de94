// Functions recorded once and replayed: the kernels that a function enqueues, at the addresses that they had. A CUDA device
// runs them as one graph; the CPU's executor runs its list. Neither costs JavaScript more than one call.
import { collected, forEachTensor, scope } from '../tensor/scope.js';
import { type Device, defaultDevice, recordWrites, type Storage, streamOf } from '../tensor/storage.js';
import { addon } from './addon.js';

/** What `Graph.counts` reports. */
export interface GraphCounts {
  /** Kernels of one run. */
  launches: number;
  /** Replays that the device has taken up so far. */
  replays: number;
  /** Those of them that ran as one graph of the device. */
  onDevice: number;
}

interface Held {
  stream: number;
  handle: number;
}

const drop = ({ stream, handle }: Held): void => addon().dropGraph(stream, handle);
const abandoned = new FinalizationRegistry<Held>(drop);

/** A captured function; made by `captureGraph`. */
export class Graph<T = unknown> implements Disposable {
  /** What the function returned. Every replay overwrites the contents of its tensors. They go with the graph. */
  readonly result: T;
  private readonly held: Held;
  private readonly written: readonly Storage[];
  private readonly release: () => void;
  private live = true;

  /** @internal */
  constructor(result: T, held: Held, written: readonly Storage[], release: () => void) {
    this.result = result;
    this.held = held;
    this.written = written;
    this.release = release;
    abandoned.register(this, held, this);
  }

  /** Runs the function's kernels again, on what its tensors hold by then. Returns at once. */
  replay(): void {
    this.requireLive('replay');
    for (const s of this.written) s.version++;
    addon().replayGraph(this.held.stream, this.held.handle);
  }

  /** Counters for tests and reports. */
  counts(): GraphCounts {
    this.requireLive('counts');
    const [launches, replays, onDevice] = addon().graphCounts(this.held.stream, this.held.handle);
    return { launches, replays, onDevice };
  }

  /** Gives back its memory, after the replays so far. Blocks until they have run. */
  dispose(): void {
    if (!this.live) return;
    this.live = false;
    abandoned.unregister(this);
    this.release();
    drop(this.held);
  }

  [Symbol.dispose](): void {
    this.dispose();
  }

  private requireLive(what: string): void {
    if (!this.live)
      throw new Error(`[Graph.${what}] a graph was used after it was disposed of; capture the function again`);
  }
}

/**
 * Runs `f` and remembers the kernels that it enqueues on `device`, so that `replay()` runs them again: on the same tensors, at
 * the same addresses, with the same numbers, the same random bits included. The capture is the first run, and its result
 * valid. What is to differ between replays belongs into tensors from outside that are overwritten in between (`write`,
 * `copyInto`), or that other kernels have written.
 *
 * Tensors from outside that `f` uses stay allocated while the graph lives, and so does all memory that `f` allocates.
 *
 * @throws Error when `f` copies between host and device: no `Tensor.from`, no `data()`, no `item()` in there; what it uploads on
 * its first call only (segment layouts, tables) has to exist before
 */
export function captureGraph<T>(f: () => T, { device = defaultDevice() }: { device?: Device } = {}): Graph<T> {
  const native = addon();
  const stream = streamOf(device);
  native.beginGraph(stream);
  let run: ReturnType<typeof collected<{ result: T; written: ReadonlySet<Storage> }>>;
  try {
    run = collected(() => recordWrites(() => scope(f)));
  } catch (error) {
    native.endGraph(false);
    throw error;
  }
  const { result, written } = run.result;
  const all = new Set(written);
  forEachTensor(result, (t) => all.add(t.storage));
  try {
    return new Graph(result, { stream, handle: native.endGraph(true) }, [...all], run.release);
  } catch (error) {
    run.release();
    throw error;
  }
}
