# For tools that know node-gyp only: one action that runs the CMake build. Not in the package, and npm never runs it.
{
  'targets': [{
    'target_name': 'keelgrad',
    'type': 'none',
    'actions': [{
      'action_name': 'cmake',
      'inputs': ['CMakeLists.txt'],
      # Never made, so that the action always runs: CMake knows what has changed.
      'outputs': ['<(INTERMEDIATE_DIR)/always'],
      'action': ['node', 'scripts/build-native.mjs'],
    }],
  }],
}
