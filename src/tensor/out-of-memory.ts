// The error of a device that has no more memory: which op asked, for what, who holds the rest. The native layer writes the
// text (StorageTable::explain); here it becomes an OutOfMemoryError, with what JavaScript knows of the op.
import { KeelgradError } from '../errors.js';

/**
 * A device has no memory left for a tensor, or for what a kernel needs beside its tensors; the latter shows at the next read.
 * Free something, or ask for less, and go on.
 */
export class OutOfMemoryError extends KeelgradError {}

// Functions that make tensors for ops: the op is whoever called them.
const makers =
  /^(Storage|Tensor)\.|^(emptyLike|copyTo|fill|full|zeros|ones|zerosLike|onesLike|launch|fused|fusedOutputs|record|owned|scope)$/;

/** The op that a stack stands in: the outermost named function of src/ops nearest to its top. */
function opOf(stack: string): string | undefined {
  let found: string | undefined;
  let inOps = false;
  for (const line of stack.split('\n')) {
    const frame = /^\s*at (?:async )?(?:(\S+) (?:\[as \w+\] )?\()?.*[/\\](\w+)[/\\][\w.-]+:\d+:\d+\)?$/.exec(line);
    if (!frame) continue;
    const [, called, folder] = frame;
    const name = called?.replace(/^(Module|Object)\./, '');
    if (folder === 'ops') {
      inOps = true;
      if (name && /^\w+$/.test(name) && !makers.test(name)) found = name;
    } else if (inOps && folder !== 'autograd' && folder !== 'tensor') {
      break;
    }
  }
  return found;
}

/** An error of the native layer, with the tensor that was asked for and the op that asked. */
export function explainAllocation(error: unknown, what: string): unknown {
  const { message, stack = '' } = error as Error;
  if (!message.startsWith('out of memory')) return error;
  const op = opOf(stack);
  return new OutOfMemoryError(`${op ? `[${op}] ` : ''}${message} (for ${what})`, { cause: error });
}

/** An error that a read brought: that of a kernel without memory under its class, any other as it is. */
export function explainFault(error: unknown): unknown {
  const { message } = error as Error;
  return /^\[\w+\] out of memory/.test(message) ? new OutOfMemoryError(message, { cause: error }) : error;
}

/** Runs the backward pass of an op: memory that runs out in it is told under the op's name. */
export function inBackwardOf<T>(op: string, f: () => T): T {
  try {
    return f();
  } catch (error) {
    if (!(error instanceof OutOfMemoryError) || error.message.includes('backward of')) throw error;
    const message = error.message.replace(/^(\[\w+\] )?/, `[backward of ${op}] `);
    throw new OutOfMemoryError(message, { cause: error.cause });
  }
}
