// The whole op case list on the CUDA kernels, run by the SIMT layer: values against definitions in float64, gradients,
// finite differences. Every tensor is an allocation with guards of its own.
import { describeOnSimt } from './support.js';

describeOnSimt('CUDA kernels', {}, () => import('../ops/cases.test.js'));
