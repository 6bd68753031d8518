// A shared library under the plugin's file name that is no plugin.
extern "C" __attribute__((visibility("default"))) int tandem_nothing_here() { return 0; }
