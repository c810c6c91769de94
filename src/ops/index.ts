// Every op, as free functions; importing it also gives tensors their methods.
import './methods.js';

export * from './elementwise.js';
export * from './head.js';
export * from './lora.js';
export * from './movement.js';
export * from './product.js';
export * from './random.js';
export * from './reduce.js';
export * from './segments.js';
export * from './softmax.js';
export * from './transformer.js';
