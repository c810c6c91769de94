import { describe, expect, it } from 'vitest';
import { didYouMean, KeelgradError, show, suggest } from '../src/errors.js';

describe('suggest', () => {
  const names = ['learning-rate', 'learning-rate-backbone', 'lora-alpha', 'lora-r', 'beta', 'batch-size', 'max-steps'];
  it.each([
    ['learning_rate', 'learning-rate'],
    ['learningRate', 'learning-rate'],
    ['laerning-rate', 'learning-rate'],
    ['bata', 'beta'],
    ['batchsize', 'batch-size'],
    ['max-step', 'max-steps'],
    ['loar-alpha', 'lora-alpha'],
  ])('%s -> %s', (name, expected) => expect(suggest(name, names)).toBe(expected));

  it('knows abbreviations, the shortest name first', () => {
    expect(suggest('mstps', names)).toBe('max-steps');
    expect(suggest('--lra', ['loss-ratio', 'learning-rate', 'lora'])).toBe('lora');
    expect(suggest('lrnrt', names)).toBe('learning-rate');
    expect(suggest('bsz', names)).toBe('batch-size');
    expect(suggest('bqz', names)).toBeUndefined();
    expect(suggest('br', ['bar-more'])).toBeUndefined();
  });

  it('keeps silent when nothing is near', () => {
    expect(suggest('zzz', names)).toBeUndefined();
    expect(didYouMean('zzz', names)).toBe('');
    expect(didYouMean('bet', names)).toBe('; did you mean "beta"?');
  });
});

describe('messages', () => {
  it('quote values in one line', () => {
    expect(show(undefined)).toBe('nothing');
    expect(show('x'.repeat(200)).length).toBe(80);
    expect(show({ a: [1] })).toBe('{"a":[1]}');
    expect([Number.NaN, Number.POSITIVE_INFINITY, null].map(show)).toEqual(['NaN', 'Infinity', 'null']);
  });
  it('are of a class of their own', () => {
    expect(new KeelgradError('x', { cause: 1 })).toMatchObject({ name: 'KeelgradError', message: 'x', cause: 1 });
  });
});
